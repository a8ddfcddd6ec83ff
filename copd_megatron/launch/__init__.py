"""The command line and what touches the machine: environment variables, run folders, diagnosis."""
