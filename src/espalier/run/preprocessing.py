"""From a picture to a network's input: what a service has to do, said once and shipped with the network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Preprocessing:
    """``(pixels / levels - mean) / std`` per channel, of pixels ``(n, channels, height, width)``, after ``resize``.

    ``resize`` says in words how a picture comes to that size; ``classes`` are the names of the outputs, where they have names.
    """

    channels: int
    height: int
    width: int
    levels: int  # the largest value of a pixel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    classes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The content of ``preprocessing.json``."""
        return json.dumps({"format": "espalier-preprocessing/1", "layout": "NCHW", **asdict(self)}, indent=1)
