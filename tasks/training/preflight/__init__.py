"""Checks of a training before it is paid for: what would leave the loss looking fine fails here, with the remedy."""
