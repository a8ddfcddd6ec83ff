"""A run folder as a page to read, and several run folders side by side."""
