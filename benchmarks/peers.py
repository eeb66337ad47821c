"""Other toolkits at the same work: cut a trained network down to a share of its MACs, in place or anew.

Each takes the network, an example, the share, the multiple that widths are to be of and a few training batches, all on the
CPU, and returns the network to be fine-tuned.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import modelopt_prune, tensorly, torch_pruning
from espalier.costs import cost
from espalier.graph import trace
from espalier.run.batches import Batch
from espalier.run.evaluate import evaluate

Cut = Callable[[nn.Module, Tensor, float, int, Sequence[Batch]], nn.Module]


def _torch_pruning(pruner_name: str, importance_name: str, *, everywhere: bool = True, **importance: Any) -> Cut:
    """In small steps, until the MACs are at or below the share: the loop that its manual shows.

    ``everywhere``: units of all layers are compared with each other ("global"); if not, every layer loses the same share.
    """

    def cut(model: nn.Module, example: Tensor, share: float, multiple: int, batches: Sequence[Batch]) -> nn.Module:
        tp = torch_pruning()
        ignored: list[nn.Module] = [m for n, m in model.named_modules() if n in ("linear", "fc", "classifier")]
        if any(type(m).__name__ == "ChannelPad" for m in model.modules()):
            # its graph cannot adjust the zero padding of option A shortcuts: inner widths only
            ignored += [m for n, m in model.named_modules() if n == "conv1" or n.endswith(".conv2")]
        pruner = getattr(tp.pruner, pruner_name)(
            model, example, importance=getattr(tp.importance, importance_name)(**importance), global_pruning=everywhere,
            iterative_steps=200, pruning_ratio=0.98, ignored_layers=ignored, round_to=multiple if multiple > 1 else None,
        )  # fmt: skip
        whole = tp.utils.count_ops_and_params(model, example)[0]
        for _ in range(200):
            pruner.step()
            if tp.utils.count_ops_and_params(model, example)[0] <= share * whole:
                return model
        raise ValueError("torch-pruning did not reach the target")

    return cut


def tucker(model: nn.Module, example: Tensor, share: float, multiple: int, batches: Sequence[Batch]) -> nn.Module:
    """tensorly's partial Tucker of every 3x3 convolution, ranks one share of the channels, the largest that fits."""
    whole = cost(trace(model, example, rehearse=False)).macs
    low, high = 0.0, 1.0
    for _ in range(12):  # ranks are whole numbers: finer than that changes nothing
        middle = (low + high) / 2
        if (
            cost(trace(_with_tucker(model, middle, multiple, decompose=False), example, rehearse=False)).macs
            <= share * whole
        ):
            low = middle
        else:
            high = middle
    if low == 0.0:
        raise ValueError("Tucker with rank 1 everywhere does not reach the target")
    return _with_tucker(model, low, multiple, decompose=True)


def _with_tucker(model: nn.Module, ratio: float, multiple: int, *, decompose: bool) -> nn.Module:
    small = copy.deepcopy(model)
    for name, module in list(small.named_modules()):
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size != (1, 1)
            and module.groups == 1
            and module.in_channels > 3
        ):
            parent, _, key = name.rpartition(".")
            setattr(small.get_submodule(parent), key, _tucker_layers(module, ratio, multiple, decompose=decompose))
    return small


def _tucker_layers(conv: nn.Conv2d, ratio: float, multiple: int, *, decompose: bool) -> nn.Sequential:
    out, inside = (multiple * max(1, round(ratio * n / multiple)) for n in (conv.out_channels, conv.in_channels))
    first = nn.Conv2d(conv.in_channels, inside, 1, bias=False)
    core = nn.Conv2d(inside, out, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)  # type: ignore[arg-type]
    last = nn.Conv2d(out, conv.out_channels, 1, bias=conv.bias is not None)
    if decompose:
        with torch.no_grad():
            weight = conv.weight.detach().double().numpy()
            (values, (left, right)), _ = tensorly().decomposition.partial_tucker(
                weight, rank=[out, inside], modes=[0, 1]
            )
            first.weight.copy_(torch.from_numpy(right.T.copy())[:, :, None, None])
            core.weight.copy_(torch.from_numpy(values))
            last.weight.copy_(torch.from_numpy(left.copy())[:, :, None, None])
            if conv.bias is not None and last.bias is not None:
                last.bias.copy_(conv.bias)
    return nn.Sequential(first, core, last)


def fastnas(model: nn.Module, example: Tensor, share: float, multiple: int, batches: Sequence[Batch]) -> nn.Module:
    """FastNAS of NVIDIA's ModelOpt: searches widths by accuracy without training, on the last of ``batches``.

    The first 50 settle BatchNorm in every candidate; with fewer it warns that scores are wrong, and does not settle it.  Its
    default divisor of 32 leaves CIFAR's narrow networks next to nothing to choose from: 4, or more where ``multiple`` is.
    """
    first = SETTLING if len(batches) > SETTLING else len(batches) // 2
    divisors = {"nn.Conv2d": "channel_divisor", "nn.BatchNorm2d": "feature_divisor", "nn.Linear": "feature_divisor"}
    small, _ = _silently(
        modelopt_prune(),
        model,
        mode=[("fastnas", {layer: {"*": {key: max(4, multiple)}} for layer, key in divisors.items()})],
        constraints={"flops": f"{100 * share}%"},
        dummy_input=example,
        config={
            "data_loader": batches[:first],
            "collect_func": lambda batch: batch[0],
            "score_func": lambda network: evaluate(network, batches[first:])["accuracy"],
            "max_iter_data_loader": first,
            "verbose": False,
        },
    )
    return small


SETTLING = 50  # batches: the length of its queue


def _silently(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Without a bar for every candidate."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return call(*arguments, **named)


PEERS: dict[str, Cut] = {
    "torch-pruning": _torch_pruning("GroupNormPruner", "GroupMagnitudeImportance", p=2),
    "torch-pruning-bn": _torch_pruning("BNScalePruner", "BNScaleImportance"),
    # By default it takes the mean over the group, which is what "torch-pruning" does already: plain filter norms instead.
    # Compared across layers they empty some (two of three networks on digits did not learn again), so layer by layer.
    "torch-pruning-magnitude": _torch_pruning(
        "MagnitudePruner", "MagnitudeImportance", everywhere=False, p=2, group_reduction="first", normalizer=None
    ),
    "tensorly-tucker": tucker,
    "modelopt-fastnas": fastnas,
}
"""Name in a recipe -> how it cuts."""

PACKAGES = {"torch-pruning": "torch_pruning", "tensorly": "tensorly", "modelopt": "modelopt"}


def lacking(method: str) -> str:
    """The package that ``method`` needs and that is not installed; empty if there is none."""
    needed = [package for begin, package in PACKAGES.items() if method in PEERS and method.startswith(begin)]
    return next((package for package in needed if importlib.util.find_spec(package) is None), "")
