"""How one layer may be represented: dense, as a row of smaller convolutions, with another kernel shape."""

from espalier.forms.chains import FORMS, chain, composed, dense_chain, sequential, stages
from espalier.forms.lowrank import LowRank
from espalier.forms.places import Place, find_places
from espalier.forms.shapes import Rectangle, cut_kernel, rectangles, shape_chain, shapes

__all__ = [
    "FORMS",
    "LowRank",
    "Place",
    "Rectangle",
    "chain",
    "composed",
    "cut_kernel",
    "dense_chain",
    "find_places",
    "rectangles",
    "sequential",
    "shape_chain",
    "shapes",
    "stages",
]
