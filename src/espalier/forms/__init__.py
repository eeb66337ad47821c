"""How one layer may be represented: dense, as a row of smaller convolutions, with another kernel shape."""

from espalier.forms.form import Form, Stage, Wish, columns, cost_of, dense_sequence, pointwise, rows, whole
from espalier.forms.lowrank import LowRank
from espalier.forms.matrix import MatrixForm
from espalier.forms.places import Place, find_places
from espalier.forms.sequences import blank, composed, sequence, sequential, stages
from espalier.forms.shapes import Rectangle, cut_kernel, rectangles, shape_sequence, shapes
from espalier.forms.table import FORMS

__all__ = [
    "FORMS",
    "Form",
    "LowRank",
    "MatrixForm",
    "Place",
    "Rectangle",
    "Stage",
    "Wish",
    "blank",
    "columns",
    "composed",
    "cost_of",
    "cut_kernel",
    "dense_sequence",
    "find_places",
    "pointwise",
    "rectangles",
    "rows",
    "sequence",
    "sequential",
    "shape_sequence",
    "shapes",
    "stages",
    "whole",
]
