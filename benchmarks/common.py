"""What the benchmarks share: networks by name, where and when a number was measured, results files, tables."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from espalier.timing import on_device

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

# ---------------------------------------------------------------- networks

CIFAR = (
    *(f"cifar:resnet{depth}{option}" for depth in (20, 32, 44, 56, 110) for option in ("", "a")), "cifar:vgg16_bn",
)  # fmt: skip
TORCHVISION = (
    "alexnet", "vgg11", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "mnasnet1_0", "regnet_y_400mf",
    "densenet121", "shufflenet_v2_x1_0", "squeezenet1_1", "googlenet", "googlenet:noaux", "inception_v3",
    "convnext_tiny", "segmentation:fcn_resnet50", "segmentation:deeplabv3_mobilenet_v3_large",
)  # fmt: skip
TIMM = (
    "timm:ghostnet_100", "timm:res2net50_26w_4s", "timm:dla34", "timm:hrnet_w18_small", "timm:cspresnet50",
    "timm:dpn68b", "timm:ese_vovnet19b_dw", "timm:rexnet_100", "timm:mobileone_s0", "timm:repvgg_a0",
    "timm:resnest14d", "timm:nfnet_f0", "timm:mobilenetv4_conv_small", "timm:xception41", "timm:fastvit_t8",
)  # fmt: skip
ATTENTION = ("timm:mobilevit_xs", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224")
ZOO = (*CIFAR, *TORCHVISION, *TIMM, *ATTENTION)

_SIZES = {"inception_v3": 75, "timm:vit_tiny_patch16_224": 224, "timm:swin_tiny_patch4_window7_224": 224}


def image_size(name: str) -> int:
    """The side of the square input: 64, or the smallest that the network takes."""
    return 32 if name.startswith("cifar:") else _SIZES.get(name, 64)


def example(name: str) -> torch.Tensor:
    return torch.zeros(1, 3, image_size(name), image_size(name))


def build(name: str, *, seed: int = 0) -> nn.Module:
    """An untrained network in eval mode; normalisations get random values, since their defaults rank nothing."""
    torch.manual_seed(seed)
    origin, _, rest = name.rpartition(":")
    if origin == "cifar":
        model = importlib.import_module("espalier.run.models").build_model(rest, num_classes=10)
    elif origin == "timm":
        model = importlib.import_module("espalier.optional").import_timm().create_model(rest)
    else:
        model = _torchvision(name)
    return _shaken(model, seed).eval()


def _torchvision(name: str) -> nn.Module:
    from espalier.optional import import_torchvision

    models = import_torchvision().models
    if name.startswith("segmentation:"):
        return getattr(models.segmentation, name.partition(":")[2])(weights=None, weights_backbone=None)
    if name == "googlenet:noaux":
        return models.googlenet(weights=None, aux_logits=False, init_weights=False)
    if name in ("googlenet", "inception_v3"):
        return getattr(models, name)(weights=None, init_weights=False)
    return getattr(models, name)(weights=None)


def _shaken(model: nn.Module, seed: int) -> nn.Module:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.modules.batchnorm._NormBase) and "Norm" not in type(module).__name__:
                continue
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key, None)
                if value is not None:
                    noise = torch.rand(value.shape, generator=random)
                    value.copy_(0.75 + 0.5 * noise if key in ("weight", "running_var") else 0.2 * noise - 0.1)
    return model


# ---------------------------------------------------------------- where and when


def environment() -> dict[str, Any]:
    """Revision, versions and hardware; no path of the machine."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "revision": _revision(),
        "versions": {
            "python": platform.python_version(),
            **{p: v for p in _PACKAGES if (v := _version(p)) is not None},
        },
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_average": round(os.getloadavg()[0], 2),
            **({"gpu_shared": _gpu_shared()} if torch.cuda.is_available() else {}),
        },
    }


def _gpu_shared() -> bool:
    """Do others hold memory of the GPU?  A process alone holds what PyTorch has reserved and some hundred MiB of CUDA's own."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() > 1 << 30


_PACKAGES = (
    "torch",
    "numpy",
    "torchvision",
    "timm",
    "torch-pruning",
    "tensorly",
    "nvidia-modelopt",
    "onnxruntime",
    "scikit-learn",
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _revision() -> str:
    """The commit, with a plus sign if the library or the benchmarks have changed since."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    return (_git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def processor() -> str:
    """Name, generation and instructions of the processor, by which times differ."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return _cpu()
    wide = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{on_device.processor()}, {wide}, {'with' if flags & {'avx512_vnni', 'avx_vnni'} else 'without'} VNNI"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


# ---------------------------------------------------------------- results


def write_results(name: str, content: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write ``folder/name.json`` in one go: an interrupted write leaves the old file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def read_results(name: str, *, folder: Path = RESULTS) -> dict[str, Any]:
    """What an earlier run wrote; empty if there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def without_paths(text: str) -> str:
    """The same text with folders cut from file names, so that results say nothing about the machine."""
    return re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)


def first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return without_paths(f"{type(error).__name__}: {line}" if line else type(error).__name__)[:200]


def rounded(value: Any, digits: int = 4) -> Any:
    """Floats to significant digits, all the way down, so that JSON stays readable."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return value


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    cells = [[str(h) for h in headers], *[["-" if c is None else str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join(("-" * (w + 1) + (":" if i else "-")) for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *[line(row) for row in cells[1:]]])


def torch_pruning() -> Any:
    """The package, an optional one."""
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ValueError("this comparison needs torch-pruning: pip install '.[bench]'") from error


def tensorly() -> Any:
    """The package, an optional one."""
    try:
        importlib.import_module("tensorly.decomposition")
        return importlib.import_module("tensorly")
    except ModuleNotFoundError as error:
        raise ValueError("this comparison needs tensorly: pip install '.[bench]'") from error


def modelopt_prune() -> Any:
    """``modelopt.torch.prune.prune``, of an optional package."""
    from espalier.optional import import_torchvision

    import_torchvision()  # which it imports itself, and which beside a CPU build of torch needs help
    try:
        return importlib.import_module("modelopt.torch.prune").prune
    except ModuleNotFoundError as error:
        raise ValueError("this comparison needs NVIDIA ModelOpt: pip install '.[modelopt]'") from error
