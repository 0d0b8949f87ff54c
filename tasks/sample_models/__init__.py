"""The small models that ship with the sample, and the scripts that make them."""
