"""How one layer may be represented: dense, as a row of smaller convolutions, with another kernel shape."""

from espalier.forms.chains import FORMS, chain, dense_chain, sequential, stages
from espalier.forms.lowrank import LowRank
from espalier.forms.places import Place, find_places

__all__ = ["FORMS", "LowRank", "Place", "chain", "dense_chain", "find_places", "sequential", "stages"]
