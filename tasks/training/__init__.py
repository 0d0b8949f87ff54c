"""Checks, data and the training process itself."""
