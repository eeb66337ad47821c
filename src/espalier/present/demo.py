"""The demonstration: real data, a real network, half of its time on this machine, in a minute or two."""

from __future__ import annotations

from pathlib import Path

from espalier.present.config import Config
from espalier.present.edge import stdout
from espalier.present.html import write_report
from espalier.present.jobs import run_job
from espalier.present.show import show_markdown
from espalier.run.rundir import METRICS, MODEL, SUMMARY, read_sealed
from espalier.run.timed import time_sentence

NETWORK = "resnet20"
# One thread: on images of 8x8 a second one gains nothing, and loses much where the other core is busy.
RECIPE = {"batch_size": 64, "threads": 1, "device": "cpu"}
DENSE = {"epochs": 12, "lr": 0.1, "warmup_epochs": 1, **RECIPE}
SMALL = {"epochs": 18, "lr": 0.05, **RECIPE}
BUDGET = {"latency": 0.5}  # in ONNX Runtime, one image at a time, one thread


def run_demo(out: Path) -> None:
    """Train dense into ``out/dense``, compress with TCP into ``out``, report; older runs there are set aside."""
    network, data = {"name": NETWORK}, {"name": "digits"}
    _say("1. Train a dense ResNet-20 on scikit-learn's 1797 real handwritten digits.\n")
    dense: Config = {"model": network, "data": data, "budget": {}, "method": {"name": "none"}, "recipe": DENSE}
    run_job(dense, out=out / "dense", force=True)
    _say("\n2. Measure its layers in ONNX Runtime here; train it on and compress it meanwhile, to half of its time.\n")
    small: Config = {
        "model": {**network, "weights": str((out / "dense" / MODEL).resolve())},
        "data": data,
        "budget": BUDGET,
        "method": {"name": "tcp"},
        "recipe": SMALL,
    }
    run_job(small, out=out, force=True)
    _say("\n3. The report.\n")
    show_markdown((out / SUMMARY).read_text(encoding="utf-8"), stdout)
    page = write_report([out])
    _say(time_sentence(read_sealed(out / METRICS)["time"]))
    _say(f"Open {page} in a browser: the same with figures, layer by layer.")
    _say(f"Everything is in {out}: network, plan, metrics, log, and the configuration that repeats it.")


def _say(text: str) -> None:
    stdout.print(text, markup=False, soft_wrap=True)
