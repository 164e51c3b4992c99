"""Numbers turned into something to read."""
