"""What the decompositions and the LC loop of TT-LC cost.

    python -m benchmarks.decompositions

One C step over a whole ResNet-32 (spectra, choice of forms within the budget, fits); TT-Tucker of its layers against tensorly,
the same matrices in turns in one run; EVBMF of the singular values of a 512 x 4608 unfolding, and the ranks it finds where they
are known; and a training step with the penalty of the L step and without, in turns, as a ratio.  Writes
``benchmarks/results/decompositions.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import tensorly
import torch
import torch.nn.functional as F
from tensorly.decomposition import partial_tucker, tensor_train
from torch import Tensor

from benchmarks import common
from espalier.forms.candidates import compose, factorise
from espalier.forms.evbmf import evbmf, threshold_ratio
from espalier.forms.spectra import spectra_of
from espalier.methods.tt_lc import TTLC
from espalier.plan import Budget
from espalier.run.models import build_model

BUDGET = Budget(macs=0.333, params=0.304)  # what the paper leaves of ResNet-32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="training steps of either kind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tensorly.set_backend("pytorch")
    rows = {
        "C step of ResNet-32": c_step(options.rounds),
        "against tensorly": against_tensorly(options.rounds),
        "EVBMF of 512 x 4608": evbmf_time(options.rounds),
        "L step": l_step(options.steps),
    }
    planted = planted_ranks()
    path = common.write_results(
        "decompositions", common.rounded({"environment": common.environment(), "rows": rows, "planted ranks": planted})
    )
    for name, row in rows.items():
        print(name, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    headers = ["matrix", "noise", "planted", "found, mean of 5", "with the noise known", "noise found"]
    print(common.table(headers, [[str(v) for v in row.values()] for row in planted]))
    print(f"written to {path.relative_to(common.ROOT)}")


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def low_rank(network: torch.nn.Module) -> dict[str, Tensor]:
    """Convolution weights as training leaves them: a falling spectrum, not the flat one of random weights."""
    torch.manual_seed(0)
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels > 3:
            shape = module.weight.shape
            ranks = [shape[1] // 2, shape[0] // 2]
            found[name] = compose(factorise(torch.randn(shape), "tucker", ranks)) + 0.1 * torch.randn(shape)
    return found


def c_step(rounds: int) -> dict[str, float]:
    """Seconds: everything from the weights to the factors, forms chosen anew."""
    network = build_model("resnet32", num_classes=10)
    run = TTLC(search=0).start(network, torch.zeros(1, 3, 32, 32), BUDGET)
    with torch.no_grad():
        for name, weight in low_rank(network).items():
            run.lc.weights[name].copy_(weight)
    times: dict[str, list[float]] = {"spectra": [], "choice": [], "fits": []}
    wanted = run.lc.wanted()
    busy = time.process_time()
    for _ in range(rounds):
        marks = [time.perf_counter()]
        spectra = spectra_of(wanted)
        marks.append(time.perf_counter())
        run.chains = run._choose(spectra, {})
        marks.append(time.perf_counter())
        run.factors = run._fit(wanted, run.chains, sweeps=3)
        marks.append(time.perf_counter())
        for kind, begin, end in zip(times, marks, marks[1:], strict=False):
            times[kind].append(end - begin)
    found = {kind: median(values) for kind, values in times.items()}
    busy = (time.process_time() - busy) / rounds  # what it takes whoever else is on the machine
    return {**found, "seconds": sum(found.values()), "processor seconds": busy, "layers": len(wanted)}


def against_tensorly(rounds: int) -> dict[str, float]:
    """Tucker-2 (HOSVD and three sweeps of HOOI) and the tensor train of its core, at half the ranks, all layers."""
    weights = low_rank(build_model("resnet32", num_classes=10))

    def ours() -> float:
        apart = 0.0
        for w in weights.values():
            ranks = (w.shape[1] // 2, w.shape[1] // 2, w.shape[0] // 2)
            apart += float((w - compose(factorise(w, "tt", ranks, sweeps=3))).square().sum())
        return apart

    def theirs() -> float:
        apart = 0.0
        for w in weights.values():
            rank = [w.shape[0] // 2, w.shape[1] // 2]
            (core, (outer, inner)), _ = partial_tucker(w, rank=rank, modes=[0, 1], init="svd", n_iter_max=3, tol=1e-5)
            b, a, kh, kw = core.shape
            matrix = core.permute(1, 2, 3, 0).reshape(a * kh, kw * b)
            left, right = tensor_train(matrix, rank=[1, w.shape[1] // 2, 1])
            back = (left[0] @ right[..., 0]).reshape(a, kh, kw, b).permute(3, 0, 1, 2)
            apart += float((w - torch.einsum("ob,bahw,ia->oihw", outer, back, inner)).square().sum())
        return apart

    times: dict[str, list[float]] = {"ours": [], "tensorly": []}
    errors = {"error of ours": ours(), "error of tensorly": theirs()}  # warm-up
    for _ in range(rounds):
        times["ours"].append(timed(ours))
        times["tensorly"].append(timed(theirs))
    found = {k: median(v) for k, v in times.items()}
    return {**found, "ratio": median(t / o for o, t in zip(times["ours"], times["tensorly"], strict=True)), **errors}


def evbmf_time(rounds: int) -> dict[str, float]:
    """Seconds from singular values to the rank; the decomposition itself is not counted."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.normal(size=(n, 100)))[0] for n in (512, 4608))
    matrix = 154.0 * u @ v.T + 0.5 * draw.normal(size=(512, 4608))
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(matrix @ matrix.T), 0))
    rank = evbmf(values, (512, 4608))[0]
    return {
        "seconds": median(timed(lambda: evbmf(values, (512, 4608))) for _ in range(rounds)),
        "rank": rank,
        "planted": 100,
    }


def planted_ranks() -> list[dict[str, Any]]:
    """Ranks that EVBMF finds: ``rank`` equal singular values, elements of variance 1, noise of a standard deviation on top."""
    rows = []
    for shape in ((64, 64), (32, 288), (576, 64), (128, 1152)):
        for noise in (0.1, 0.5, 1.0, 2.0):
            for rank in (1, 8, 16, 24):
                found = [_planted(shape, rank, noise, seed) for seed in range(5)]
                ranks, known, variance = (float(np.mean(column)) for column in zip(*found, strict=True))
                rows.append(
                    {
                        "matrix": f"{shape[0]} x {shape[1]}", "noise": noise, "planted": rank, "found": round(ranks, 1),
                        "known": round(known, 1), "noise found": round(variance**0.5, 3),
                    }
                )  # fmt: skip
    return rows


def _planted(shape: tuple[int, int], rank: int, noise: float, seed: int) -> tuple[int, int, float]:
    draw = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draw.normal(size=(n, rank)))[0] for n in shape)
    matrix = np.sqrt(shape[0] * shape[1] / rank) * u @ v.T + noise * draw.normal(size=shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    free, variance = evbmf(values, shape)
    alpha = min(shape) / max(shape)
    tau = threshold_ratio(alpha)
    known = int((values**2 > max(shape) * noise**2 * (1 + tau) * (1 + alpha / tau)).sum())
    return free, known, variance


def l_step(steps: int) -> dict[str, float]:
    """A training step (batch 128, bf16, channels last) with the penalty over one without, in turns."""
    network = build_model("resnet20", num_classes=10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = TTLC(search=0).start(network, torch.zeros(1, 3, 32, 32), BUDGET)
    run._c_step(0.01)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (128,))

    def step(with_penalty: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(network(x).float(), y)
        if with_penalty:
            loss = loss + run.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if with_penalty:
            run.step(progress=0.02, optimizer=optimizer)

    for kind in (True, False):
        step(kind)
    pairs = [(timed(lambda: step(True)), timed(lambda: step(False))) for _ in range(steps)]
    return {
        "plain": median(p for _, p in pairs),
        "with penalty": median(w for w, _ in pairs),
        "ratio": median(w / p for w, p in pairs),
    }


if __name__ == "__main__":
    main()
