"""Side-by-side measurements; each writes `results/<name>.json`."""
