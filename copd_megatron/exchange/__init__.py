"""Exchange: who teaches whom, when, and how the signals travel."""
