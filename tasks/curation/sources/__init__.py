"""Readers of what pools are made from, one file a format; each yields rows in the source's own order."""
