"""Numbers about a checkpoint directory."""
