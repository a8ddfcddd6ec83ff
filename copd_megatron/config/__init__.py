"""Run configuration: one strict section per folder, composed by ``run.RunConfig``."""
