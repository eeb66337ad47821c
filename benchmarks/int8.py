"""Pruning and eight bits together: dense and small, float and int8, in turns in ONNX Runtime; sizes and load times of files.

    python -m benchmarks.int8 [--data-dir D] [NETWORK ...]

Small is half of the MACs in multiples of 16, by ``es.Magnitude()``.  Times need no training.  With ``--data-dir`` the ResNet-20
of the published weights (``D/weights``) is cut to half of its MACs by ``es.SVDOneShot()`` and trained for two epochs, and all
four are judged by the whole test set.  Every processor has rows of its own, since not all have instructions for eight bits
(VNNI); its networks that are in the results already are measured again, others stay.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import espalier as es
from benchmarks.common import environment, processor, read_results, rounded, table, write_results
from espalier.deploy.int8 import export_int8
from espalier.run.models import load_weights
from espalier.run.onnx import to_onnx_bytes
from espalier.timing.bits import quantised

NAME = "int8"
NETWORKS: dict[str, tuple[str, int, int]] = {
    "resnet18": ("torchvision:resnet18", 1000, 224),
    "mobilenet_v2": ("torchvision:mobilenet_v2", 1000, 224),
    "cifar:resnet20": ("resnet20", 10, 32),
}
VARIANTS = ("dense float", "dense int8", "small float", "small int8")
KINDS = {"safetensors": ".safetensors", "ONNX": ".onnx", "torch.export": ".pt2", "TorchScript": ".pt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for label in options.networks or NETWORKS:
        record(label, timed(*NETWORKS[label]))
    if options.data_dir:
        record("cifar:resnet20, judged", judged(Path(options.data_dir)))
    print(as_table(read_results(NAME)))


def record(label: str, found: dict[str, Any]) -> None:
    results = read_results(NAME)
    results.setdefault(processor(), {})[label] = {**rounded(found), "environment": environment()}
    write_results(NAME, results)


def timed(name: str, classes: int, side: int) -> dict[str, Any]:
    """Milliseconds of all four, and of the small network the size and load time of every kind of file."""
    torch.manual_seed(0)
    example = torch.randn(1, 3, side, side)
    dense = es.build_model(name, num_classes=classes, image_size=side).eval()
    small = es.compress(dense, example, budget=es.Budget(macs=0.5, multiple_of=16), method=es.Magnitude()).model.eval()
    return {"milliseconds": times(dense, small, example), "files": files(small, example)}


def times(dense: nn.Module, small: nn.Module, example: Tensor) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, network in (("dense", dense), ("small", small)):
            plain = to_onnx_bytes(network, example)
            calibration = [(torch.randn(4, *example.shape[1:]).numpy(),)]  # time does not depend on it
            for kind, content in (("float", plain), ("int8", quantised(plain, calibration))):
                found[f"{name} {kind}"] = Path(folder) / f"{name}-{kind}.onnx"
                found[f"{name} {kind}"].write_bytes(content)
        timings = es.latency(found, example, backend="onnxruntime", batch_sizes=(1,), repeats=60, seconds=20.0)
    return {t.name: t.milliseconds for t in timings}


def files(small: nn.Module, example: Tensor) -> dict[str, dict[str, float]]:
    """Bytes and milliseconds to load, fastest of five."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"model{ending}" for kind, ending in KINDS.items()}
        es.save(small, paths["safetensors"])
        es.export_onnx(small, paths["ONNX"], example)
        es.export_torch(small, paths["torch.export"], example)
        es.export_torch(small, paths["TorchScript"], example)
        load: dict[str, Callable[[Path], Any]] = {
            "safetensors": lambda p: es.load(p, base=small),
            "ONNX": lambda p: onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]),
            "torch.export": lambda p: torch.export.load(p).module(),
            "TorchScript": lambda p: torch.jit.load(str(p)),
        }
        return {k: {"bytes": p.stat().st_size, "load_ms": 1e3 * fastest(load[k], p)} for k, p in paths.items()}


def fastest(load: Callable[[Path], Any], path: Path) -> float:
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        load(path)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def judged(folder: Path) -> dict[str, Any]:
    """Accuracy and time of the published ResNet-20 and of its half, in float and in eight bits."""
    data = es.load_data("cifar10", data_dir=folder)
    dense = es.build_model("resnet20a", num_classes=10)
    load_weights(dense, folder / "weights" / "resnet20-12fca82f.th")
    dense.eval()
    calibration = list(data.calibration_batches(batch_size=128, batches=8))
    budget = es.Budget(macs=0.5, multiple_of=4)
    recipe = es.Recipe(epochs=2, lr=0.02, distill=0.5, channels_last=True)
    small = es.compress(dense, data, budget=budget, method=es.SVDOneShot(), recipe=recipe).model.eval()
    accuracy = {}
    with tempfile.TemporaryDirectory() as out:
        for name, network in (("dense", dense), ("small", small)):
            found = export_int8(
                network, Path(out) / f"{name}.onnx", calibration[:4], data.test_batches(), most_lost=100.0
            )
            accuracy |= {f"{name} float": found.float_metric, f"{name} int8": found.metric}
    return {"milliseconds": times(dense, small, data.example()), "accuracy": accuracy}


def as_table(results: dict[str, Any]) -> str:
    """Milliseconds, and accuracy where there is one; then files."""
    lines, sizes = [], []
    for where, rows in results.items():
        for label, found in rows.items():
            ms, accuracy = found["milliseconds"], found.get("accuracy", {})
            cells = [f"{ms[v]:.3g}" + (f" ({accuracy[v]:.2f} %)" if accuracy else "") for v in VARIANTS]
            faster = (f"{ms[one] / ms[two]:.2f}x" for one, two in (VARIANTS[2:], (VARIANTS[0], VARIANTS[3])))
            lines.append([where, label, *cells, *faster])
    for label, found in next(iter(results.values()), {}).items():
        for kind, file in found.get("files", {}).items():
            sizes.append([f"{label}: {kind}", f"{file['bytes'] / 1e6:.2f}", f"{file['load_ms']:.0f}"])
    first = table(["processor", "network, ms", *VARIANTS, "int8 after pruning", "both"], lines)
    return first + ("\n\n" + table(["file of the small network", "MB", "ms to load"], sizes) if sizes else "")


if __name__ == "__main__":
    main()
