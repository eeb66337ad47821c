"""The log for TensorBoard, for those who like to watch; the CSV is always written."""

from __future__ import annotations

import os
from dataclasses import asdict

from espalier.optional import import_optional
from espalier.run.loop import History, OnEpoch


def tensorboard(folder: str | os.PathLike[str]) -> OnEpoch:
    """What to give as ``on_epoch``: writes every number of every epoch to ``folder``.

    A resumed run writes its earlier epochs again, so that the curves are whole.

    Raises: MissingPackage if the extra ``tensorboard`` is not installed.
    """
    import_optional("tensorboard", extra="tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.fspath(folder))
    written: set[int] = set()

    def on_epoch(history: History) -> None:
        for epoch in history.epochs:
            if epoch.epoch not in written:
                written.add(epoch.epoch)
                for name, value in asdict(epoch).items():
                    if name != "epoch" and value is not None:
                        writer.add_scalar(name, value, epoch.epoch)
        writer.flush()

    return on_epoch
