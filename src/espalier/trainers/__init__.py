"""Compression inside the trainers of others: callbacks that need no change to a training step."""
