"""How fast models are: what `slimlm bench` measures."""
