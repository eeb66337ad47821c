"""Train and prune a network until it fills a given budget exactly, as an ordinary smaller PyTorch model."""

__version__ = "0.1.0"
