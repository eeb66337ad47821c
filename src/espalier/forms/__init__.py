"""How one layer may be represented: dense, as a row of smaller convolutions, with another kernel shape."""

from espalier.forms.lowrank import LowRank
from espalier.forms.places import Place, find_places
from espalier.forms.sequences import FORMS, composed, dense_sequence, sequence, sequential, stages
from espalier.forms.shapes import Rectangle, cut_kernel, rectangles, shape_sequence, shapes

__all__ = [
    "FORMS",
    "LowRank",
    "Place",
    "Rectangle",
    "composed",
    "cut_kernel",
    "dense_sequence",
    "find_places",
    "rectangles",
    "sequence",
    "sequential",
    "shape_sequence",
    "shapes",
    "stages",
]
