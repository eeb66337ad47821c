"""Networks by name - CIFAR's own, torchvision's, timm's and the user's - and their weights.

Names that :func:`build_model` understands:

=========================  ==========================================================================
``resnet20``               CIFAR ResNet with option-B shortcuts (also 8, 32, 44, 56, 110)
``resnet20a``              the same with option-A shortcuts (parameter-free)
``cifar_resnet18``         ResNet-18 with a 3x3 first convolution, for small images
``vgg16_bn``               CIFAR VGG-16 with BatchNorm; also ``cifar_vgg16_bn``
``torchvision:NAME``       a network of torchvision
``timm:NAME``              a network of timm
``package.module:factory`` the user's own: a function that returns an ``nn.Module``; also ``file.py:factory``
=========================  ==========================================================================

Any other bare name is looked for in torchvision, then in timm.
"""

import argparse
import difflib
import importlib
import importlib.util
import inspect
import os
import pathlib
import pickle
import sys
import traceback
import types
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.graph.reasons import is_users
from espalier.graph.watch import first_line
from espalier.layers import ChannelPad
from espalier.optional import MissingPackage, import_timm, import_torchvision

# ---------------------------------------------------------------- CIFAR ResNets


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_planes: int, planes: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride=stride, option=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(in_planes: int, planes: int, *, stride: int, option: str) -> nn.Module:
    if stride == 1 and in_planes == planes:
        return nn.Identity()
    if option == "A":
        before = (planes - in_planes) // 2
        return ChannelPad(before, planes - in_planes - before, stride=stride)
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))


class _ResNet(nn.Module):
    """A 3x3 convolution of stride 1, stages of ``blocks`` blocks, the mean over the map, one linear layer.

    Takes ``(n, in_channels, h, w)`` of any size from 1x1 on.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, *, num_classes: int, in_channels: int, shortcut: str
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for number, (before, planes) in enumerate(zip((widths[0], *widths), widths, strict=False), 1):
            first = CifarBlock(before, planes, stride=1 if number == 1 else 2, shortcut=shortcut)
            rest = [CifarBlock(planes, planes, stride=1, shortcut=shortcut) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], num_classes)
        _init_convolutions(self)


class CifarResNet(_ResNet):
    """The ResNet for 32x32 images: depth 6n+2, three stages of n blocks with 16, 32 and 64 channels.

    Where the shape changes, ``shortcut`` "B" projects with a 1x1 convolution and "A" subsamples and pads with zero channels, as
    in the published CIFAR tables. Source: He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.

    Raises: ValueError if the depth is not 6n+2 or the shortcut neither "A" nor "B".
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3, shortcut: str = "B") -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a CIFAR ResNet has 6n+2 layers (8, 14, 20, ...), not {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut is 'A' or 'B', not {shortcut!r}")
        blocks = (depth - 2) // 6
        super().__init__((16, 32, 64), blocks, num_classes=num_classes, in_channels=in_channels, shortcut=shortcut)
        self.depth, self.option = depth, shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))  # type: ignore[operator]
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class CifarResNet18(_ResNet):
    """ImageNet's ResNet-18 for small images: four stages of two blocks with 64 to 512 channels, option-B shortcuts.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016, table 1, as CIFAR tables use it.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__((64, 128, 256, 512), 2, num_classes=num_classes, in_channels=in_channels, shortcut="B")

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))  # type: ignore[operator]
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# ---------------------------------------------------------------- CIFAR VGG

_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVgg(nn.Module):
    """VGG-16 with BatchNorm for small images: 13 convolutions and one linear layer.

    Takes ``(n, in_channels, h, w)``. Each of the five stages ends in a 2x2 max-pool; a pool that an image of
    ``image_size`` would reach with a single pixel is left out when the network is built, so 8x8 digits pass
    through three pools and 32x32 images through all five.
    Source: Simonyan & Zisserman, Very Deep Convolutional Networks, 2015, as the CIFAR pruning tables use it.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = image_size
        for stage in _VGG16_STAGES:
            for planes in stage:
                layers += [
                    nn.Conv2d(in_channels, planes, 3, padding=1, bias=False),
                    nn.BatchNorm2d(planes),
                    nn.ReLU(inplace=True),
                ]
                in_channels = planes
            if size >= 2:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


# ---------------------------------------------------------------- networks by name

Factory = Callable[..., nn.Module]

DEPTHS = (8, 20, 32, 44, 56, 110)
CIFAR_MODELS: dict[str, Factory] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in DEPTHS},  # 8: the image classifier of MLPerf Tiny
    **{f"resnet{depth}a": partial(CifarResNet, depth, shortcut="A") for depth in DEPTHS},
    "cifar_resnet18": CifarResNet18,
    "vgg16_bn": CifarVgg,
    "cifar_vgg16_bn": CifarVgg,
}


def build_model(name: str, *, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Build the network ``name``, untrained, for the classes, channels and size of the data.

    The module's docstring lists the names. A factory of the user's own receives those of ``num_classes``,
    ``in_channels`` and ``image_size`` (pixels) that it takes by name. Nothing is downloaded.

    Raises: ValueError for a name nobody knows (with the closest ones), for a torchvision network asked to
    take other than 3 channels, and for a factory that cannot be called, fails or does not return an ``nn.Module``;
    MissingPackage where the network's package is not installed.
    """
    origin, _, rest = name.rpartition(":")
    if origin == "torchvision":
        return _torchvision_model(rest, num_classes=num_classes, in_channels=in_channels)
    if name.startswith("timm:"):
        return _timm_model(name[5:], num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    if runs_code(name):
        return _own_model(name, sizes)
    if name in CIFAR_MODELS:
        return CIFAR_MODELS[name](**_taken(CIFAR_MODELS[name], sizes, name))
    if name in _torchvision_names():
        return _torchvision_model(name, num_classes=num_classes, in_channels=in_channels)
    if _timm_knows(name):
        return _timm_model(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    raise _unknown(name, [*CIFAR_MODELS, *_torchvision_names(), *_timm_names()])


def runs_code(name: str) -> bool:
    """Whether building ``name`` imports and calls what it names: a factory of the user's own, not a known network."""
    return ":" in name and not name.startswith(("torchvision:", "timm:"))


def model_names() -> list[str]:
    """The names of the CIFAR networks, which need no optional package."""
    return list(CIFAR_MODELS)


def _unknown(name: str, known: list[str]) -> ValueError:
    place = Path(name)
    if place.is_dir():
        return ValueError(
            f"{name} is a folder, and a network has a name; of a run es.load_run({name!r}) opens the network, "
            f"and espalier evaluate {name} judges it"
        )
    if place.suffix == ".py":
        return ValueError(f"{name} is a file of code: name the function in it that builds the network, {name}:build")
    if place.suffix in (".pt", ".pth", ".safetensors", ".ckpt", ".th"):
        return ValueError(
            f"{name} is a file of weights: give it as --weights {name}, and --model with the network's name"
        )
    if place.suffix == ".onnx":
        return ValueError(
            f"{name}: an ONNX file cannot be trained; give the PyTorch network, as package.module:factory"
        )
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=5)
    hint = f"close matches: {', '.join(close)}" if close else f"ours are {', '.join(CIFAR_MODELS)}"
    absent = (
        ""
        if len(known) > len(CIFAR_MODELS)
        else "; networks of torchvision and timm need these packages, the extra 'models'"
    )
    return ValueError(f"no network is called {name!r}; {hint}{absent}; your own is package.module:factory")


def _torchvision_names() -> list[str]:
    try:
        import_torchvision()
    except MissingPackage:
        return []
    return importlib.import_module("torchvision.models").list_models()


def _timm_names() -> list[str]:
    try:
        return import_timm().list_models()
    except MissingPackage:
        return []


def _timm_knows(name: str) -> bool:
    try:
        return import_timm().is_model(name)
    except MissingPackage:
        return False


def _torchvision_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise _unknown(name, models.list_models())
    taken = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, object] = {"num_classes": num_classes}
    if "weights_backbone" in taken:
        options["weights_backbone"] = None  # the default would download a trained backbone
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # what they do anyway, after a warning
    model = models.get_model(name, weights=None, **options)
    if in_channels != 3:
        _take_channels(model, in_channels, name)
    return model


def _take_channels(model: nn.Module, count: int, name: str) -> None:
    """Let the first convolution, which in torchvision reads the image, read ``count`` channels; answers stay as large."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        other = f"timm:{name}" if _timm_knows(name) else "a network of timm"
        raise ValueError(
            f"torchvision's {name} takes 3 input channels and the data has {count}; use {other}, "
            f"which adapts, one of {', '.join(CIFAR_MODELS)}, or your own package.module:factory"
        )
    turns = torch.arange(count) % 3
    first.weight = nn.Parameter(first.weight.detach()[:, turns] * (3 / count) ** 0.5)
    first.in_channels = count


def _timm_model(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    options: dict[str, object] = {"num_classes": num_classes, "in_chans": in_channels}
    config = timm.models.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size  # transformers fix their number of patches when they are built
    return timm.create_model(name, pretrained=False, **options)


def _own_object(module: str, factory: str) -> Any:
    """What ``factory`` names in a module, or in a file ending in ``.py``, of the user's own.

    Raises: ValueError if it cannot be imported or has no such function.
    """
    name = f"{module}:{factory}"
    try:
        found = _import_file(Path(module)) if module.endswith(".py") else _import_from_here(module)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is None or not f"{module}.".startswith(f"{absent}."):
            raise _failed(name, error) from error
        raise ValueError(
            f"{name}: there is no module {absent!r} in the current folder or among the installed packages"
        ) from error
    build = getattr(found, factory, None)
    if not callable(build):
        raise _no_factory(module, factory, [key for key, value in vars(found).items() if callable(value)])
    return build


def own_made(name: str, sizes: Mapping[str, int]) -> Any:
    """What ``module:factory`` or ``file.py:factory`` returns, given those of ``sizes`` that it takes by name."""
    module, _, factory = name.rpartition(":")
    build = _own_object(module, factory)
    arguments = _taken(build, sizes, name)
    try:
        return build(**arguments)
    except Exception as error:
        raise _failed(name, error) from error


def own_defaults(name: str) -> dict[str, int]:
    """Those of ``num_classes``, ``in_channels`` and ``image_size`` that a factory of the user's own has defaults for."""
    module, _, factory = name.rpartition(":")
    try:
        parameters = inspect.signature(_own_object(module, factory)).parameters
    except (TypeError, ValueError):
        return {}
    sizes = ("num_classes", "in_channels", "image_size")
    return {n: parameters[n].default for n in sizes if n in parameters and type(parameters[n].default) is int}


def _own_model(name: str, sizes: Mapping[str, int]) -> nn.Module:
    model = own_made(name, sizes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must return an nn.Module and returned a {type(model).__name__}")
    return model


def _failed(name: str, error: Exception) -> ValueError:
    """What went wrong in the user's own code, and at which of its lines."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename) and f.filename not in ours]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return ValueError(f"{name}: {type(error).__name__}: {first_line(error)}{place}")


def _no_factory(module: str, factory: str, callables: list[str]) -> ValueError:
    close = difflib.get_close_matches(factory, callables, n=5) or callables[:5]
    return ValueError(f"{module} has no function {factory!r}; it has {', '.join(close) or 'no functions'}")


def _import_file(file: Path) -> object:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # what it imports lies beside it
    spec = importlib.util.spec_from_file_location(f"{file.stem}_of_{abs(hash(file.resolve()))}", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # what is defined there is looked up by its module
    spec.loader.exec_module(found)
    return found


def _import_from_here(module: str) -> object:
    # An installed command starts with its own folder on the path; add the user's, as python -m does.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)


def _taken(build: Factory, sizes: Mapping[str, int], name: str) -> Mapping[str, int]:
    """Those of ``sizes`` that ``build`` takes by name."""
    try:
        taken = inspect.signature(build).parameters.values()
    except (TypeError, ValueError) as error:  # a builtin without a signature
        raise ValueError(f"{name}: {build!r} cannot be a factory of networks: {error}") from error
    named = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} & sizes.keys()
    needed = [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if lacking := [n for n in needed if n not in named]:
        raise ValueError(
            f"{name}: takes {', '.join(lacking)}, which is not passed: a factory gets those of {', '.join(sizes)} that it "
            "takes by name; give the others a default"
        )
    everything = any(p.kind is p.VAR_KEYWORD for p in taken)
    return {key: value for key, value in sizes.items() if everything or key in named}


# ---------------------------------------------------------------- weights

_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema", "teacher"),  # where there is nothing else
)
"""Under what training scripts save weights."""
_SCALAR: Any = np.float64(0).__reduce__()[0]  # what numpy's numbers are unpickled by
_HARMLESS: list[Any] = [
    *(argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))),
    *(_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")),  # its name before numpy 2
]
"""What training scripts save beside weights, and what runs no code when it is read: options, paths, numbers of numpy."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 10
_NESTED = 8  # dictionaries in dictionaries


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights into ``model``, all of them or none.

    Takes safetensors or a torch checkpoint (read with ``weights_only=True``: nothing in it is executed).
    Looks inside the entries under which training scripts save weights (``state_dict``, ``model``, ``net``, ``ema`` ...), lets
    options of ``argparse``, paths and numbers of numpy stand beside them, and drops the prefixes that DataParallel,
    torch.compile and Lightning put before every name.

    Raises: ValueError naming the file if it is absent, truncated or not a weights file, and listing what is
    missing, unexpected or of another shape if it does not fit; the model is then unchanged.
    """
    path = Path(path)
    weights = _strip_prefixes(_unwrap(_read_weights(path), path), set(model.state_dict()))
    problems = _misfits(model, weights)
    if problems:
        name = type(model).__name__
        raise ValueError("\n".join([f"{path} does not fit {name}:", *problems, *_advice(model, weights)]))
    model.load_state_dict(weights)


def _program_in(path: Path) -> str:
    """What a file of PyTorch is that holds a whole network and not its weights alone; empty for anything else."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        names = [name.split("/") for name in archive.namelist()]  # the first folder is called as the file was
        if any({"archive_format", "serialized_exported_program.json"} & set(parts[-1:]) for parts in names):
            return "a program of torch.export"
        if any(parts[1:2] == ["code"] for parts in names):
            return "a TorchScript file"
    return ""


def _read_weights(path: Path) -> object:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file of weights, of a run {path / 'model.safetensors'}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such weights file")
    if path.suffix == ".onnx":
        raise ValueError(f"{path}: is an ONNX file; give the PyTorch checkpoint that it was exported from")
    if program := _program_in(path):
        raise ValueError(f"{path}: is {program}; give the checkpoint that it was made from")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of weights alone: {_objects_in(path)}; save model.state_dict() with torch.save, or "
            "safetensors"
        ) from error
    except Exception as error:  # a damaged file may raise anything: EOFError, RuntimeError, SafetensorError, ...
        raise ValueError(f"{path} cannot be read: truncated, or not a weights file ({error})") from error


def _objects_in(path: Path) -> str:
    """What a pickle would make, by name."""
    with suppress(Exception):
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        harmless = {k[1] if isinstance(k, tuple) else f"{k.__module__}.{k.__qualname__}" for k in _HARMLESS}
        if odd := [name for name in found if name not in harmless]:
            return f"it holds pickled objects, whose code would be run: {', '.join(odd[:3])}{' ...' if odd[3:] else ''}"
    return "it is truncated, or holds pickled objects that would have to be executed"


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for _ in range(_NESTED):  # a file may hold itself
        if not isinstance(content, Mapping) or any(isinstance(v, Tensor) for v in content.values()):
            break
        inner = next((content[key] for key in _WRAPPERS if _holds_tensors(content.get(key))), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    odd = [key for key, value in content.items() if isinstance(value, Tensor) and not isinstance(key, str)]
    if odd:
        raise ValueError(
            f"{path} has weights under {odd[0]!r}, a {type(odd[0]).__name__}; names of parameters are strings"
        )
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for key, value in weights.items():
        kind = "is quantised" if value.is_quantized else "is on meta, without numbers" if value.is_meta else ""
        kind = kind or ("" if value.layout is torch.strided else f"is sparse ({value.layout})")
        if kind:
            raise ValueError(f"{path}: {key!r} {kind}; save plain tensors: tensor.dequantize(), tensor.to_dense()")
    if not weights:
        raise ValueError(f"{path} holds no weights (its entries: {', '.join(map(str, content)) or 'none'})")
    return weights


def _holds_tensors(value: object, depth: int = _NESTED) -> bool:
    if isinstance(value, Mapping):
        return depth > 0 and any(_holds_tensors(v, depth - 1) for v in value.values())
    return isinstance(value, Tensor)


def _strip_prefixes(weights: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    for _ in range(len(_PREFIXES)):  # wrappers nest: module._orig_mod.conv1.weight
        for prefix in _PREFIXES:
            shared = all(key.startswith(prefix) for key in weights)
            if shared and not any(key.startswith(prefix) for key in wanted):
                weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _misfits(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    own = model.state_dict()
    # Checkpoints of torch 0.4 and before do not count batches; load_state_dict fills the counters in.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    reshaped = [
        f"{key} ({_shape(weights[key])} in the file, {_shape(own[key])} in the model)"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    parts = {"missing in the file": missing, "not in the model": unexpected, "of another shape": reshaped}
    return [_listed(title, keys) for title, keys in parts.items() if keys]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(title: str, keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"  {len(keys)} {title}: {', '.join(keys[:_SHOWN])}{more}"


def _advice(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Which CIFAR ResNet the weights belong to, where that is what went wrong."""
    if not isinstance(model, CifarResNet):
        return []
    blocks = sum(key.startswith("layer") and key.endswith(".conv1.weight") for key in weights)
    projected = any(".shortcut." in key for key in weights)
    fitting = f"resnet{2 * blocks + 2}{'' if projected else 'a'}"
    given = f"resnet{model.depth}{'a' if model.option == 'A' else ''}"
    if fitting == given or fitting not in CIFAR_MODELS:
        return []
    kind = "option-B shortcuts (1x1 convolutions)" if projected else "option-A shortcuts (no weights of their own)"
    return [f"  the network is {given}; these are weights of {fitting}, with {kind}"]
