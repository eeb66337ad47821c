"""Tensors from one device to another, all in one piece.

Each copy from a GPU waits for it, and a small decomposition there waits again and takes longer than on the CPU: whoever
decomposes the weights of a network fetches all of them first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


def moved(tensors: Mapping[Key, Tensor], device: torch.device | str) -> dict[Key, Tensor]:
    """The same on ``device``, in one copy per dtype; what is there already stays the tensor it is."""
    found, target = dict(tensors), torch.device(device)
    groups: dict[tuple[torch.device, torch.dtype], list[Key]] = {}
    for key, tensor in found.items():
        if tensor.device != target:
            groups.setdefault((tensor.device, tensor.dtype), []).append(key)
    for keys in groups.values():
        flat = torch.cat([found[k].detach().reshape(-1) for k in keys]).to(target)
        pieces = flat.split([found[k].numel() for k in keys])
        found.update({k: piece.view(found[k].shape) for k, piece in zip(keys, pieces, strict=True)})
    return found
