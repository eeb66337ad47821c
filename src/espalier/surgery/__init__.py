"""Carry a plan out, save and load what it makes, and prove it."""

from espalier.surgery.files import load, rebuild, save, structure
from espalier.surgery.ranks import change_bases, cut_ranks, decompositions, split_layers
from espalier.surgery.shrink import mask, put_layer, shrink, shrink_
from espalier.surgery.verify import Check, Proof, verify
from espalier.surgery.writing import write_beside

__all__ = [
    "Check",
    "Proof",
    "change_bases",
    "cut_ranks",
    "decompositions",
    "load",
    "mask",
    "put_layer",
    "rebuild",
    "save",
    "shrink",
    "shrink_",
    "split_layers",
    "structure",
    "verify",
    "write_beside",
]
