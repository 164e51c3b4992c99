"""Checkpoints on disk: finding, checking, reading and writing them a few tensors at a time."""
