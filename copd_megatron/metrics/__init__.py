"""Names, sinks and displays of what a run measures."""
