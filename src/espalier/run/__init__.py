"""Data sets, networks and the training loop."""
