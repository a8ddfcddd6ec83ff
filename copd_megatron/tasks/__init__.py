"""Tasks: questions, verifiers and rewards."""
