"""The cost of a step, on paper: closed forms that need no tensors and no ranks."""
