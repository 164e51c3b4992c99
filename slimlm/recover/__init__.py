"""Training of a whole compressed model towards the dense one, in memory; what compression made of it stays."""
