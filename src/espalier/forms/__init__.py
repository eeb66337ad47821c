"""How one layer may be represented."""
