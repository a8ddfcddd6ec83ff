"""The command line, and everything that touches the machine: environment variables, run folders, diagnosis."""
