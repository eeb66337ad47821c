"""Checksums of plain values and tensors: what was written is what is read, or one line says that it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SEAL = "sha256"
"""The name under which a file carries the checksum of everything else in it."""


def seal(value: Any) -> str:
    """SHA-256 over dictionaries, lists and tuples of tensors, numbers, strings and ``None``, as hexadecimal digits.

    Tuples count as lists, and the order of a dictionary does not count: that is how JSON and TOML give them back.  Of a tensor
    counts what a reader gets: data type, shape, elements.

    Raises: TypeError for anything else.
    """
    digest = hashlib.sha256()
    _add(value, digest.update)
    return digest.hexdigest()


def _add(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, dict):
        update(b"{%d" % len(value))
        for key in sorted(value, key=repr):
            update(repr(key).encode())
            _add(value[key], update)
    elif isinstance(value, (list, tuple)):
        update(b"[%d" % len(value))
        for item in value:
            _add(item, update)
    elif isinstance(value, (Tensor, nn.Parameter)):
        update(f"t{value.dtype}{tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif value is None or isinstance(value, (bool, int, float, str)):
        update(f"{type(value).__name__}{value!r}".encode())
    else:
        raise TypeError(f"a {type(value).__name__} has no checksum")


def sealed_json(content: dict[str, Any]) -> str:
    """``content`` as JSON with its checksum in it."""
    again = json.loads(json.dumps(content))  # as it will be read: tuples as lists, keys as strings
    return json.dumps({**again, SEAL: seal(again)}, indent=1)


def opened_json(text: str, *, where: str) -> dict[str, Any]:
    """Inverse of ``sealed_json``; a file from before there were checksums has none and is taken as it is.

    Raises: ValueError if it is no JSON table, or not what was written.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: damaged (holds a {type(content).__name__}, not a table)")
    written = content.pop(SEAL, None)
    if written is not None and written != seal(content):
        raise ValueError(f"{where}: {DAMAGED}")
    return content


DAMAGED = "damaged, or changed by something else than the program that wrote it (its checksum is another)"
