"""Carry a plan out, prove it, save and load it."""
