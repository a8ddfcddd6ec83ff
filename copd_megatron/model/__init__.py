"""The frozen backbone, its shape, its weights, its adapters, and what it sees."""
