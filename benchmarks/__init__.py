"""Measurements, each a plain script that writes what it found to ``benchmarks/results``."""
