"""What came of a budget of time: the finished network as it is exported, measured in turns with the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from espalier.copies import copy_model
from espalier.plan import Budget, milliseconds_of
from espalier.run.onnx import positional, to_onnx_bytes
from espalier.timing import on_device
from espalier.timing.bits import in_precision
from espalier.timing.making import asked, batched
from espalier.timing.profile import Profile, ProfileSetting
from espalier.timing.torch_programs import exported, saved

SECONDS = 2.0  # of measuring
STAIR = 0.08  # below the budget by more: there is no network in between


@dataclass(frozen=True)
class TimeKept:
    """A budget of time and what the network takes.  ``dense`` and ``small`` are milliseconds of one run."""

    asked: float | str  # as the budget has it
    limit: float  # milliseconds
    dense: float
    small: float
    setting: ProfileSetting
    above: float | None = None  # milliseconds of the next larger network that was measured while planning

    @property
    def fraction(self) -> float:
        return self.small / self.dense


def time_kept(
    dense: nn.Module, small: nn.Module, example: Any, budget: Budget, *, above: float | None = None
) -> TimeKept | None:
    """Measure both networks where the budget is about time.  Raises: ValueError if one cannot be exported."""
    profile = budget.profile
    if budget.latency is None or not isinstance(profile, Profile):
        return None
    files = [delivered(model, example, profile.setting) for model in (dense, small)]
    whole, left = on_device.race(files, seconds=SECONDS, pace=profile.dense, **asked(profile.setting))
    step = None if above is None else above * whole / profile.dense
    return TimeKept(budget.latency, milliseconds_of(budget.latency, whole), whole, left, profile.setting, step)


def delivered(model: nn.Module, example: Any, setting: ProfileSetting) -> bytes:
    """The file that the runtime of ``setting`` is given."""
    if setting.runtime == "torch":
        plain = copy_model(model, {}).cpu().eval()
        return saved(exported(plain, batched(example, setting.batch)))
    return in_precision(to_onnx_bytes(model, example), setting, [x.numpy() for x in positional(example)])


def time_sentence(kept: Mapping[str, Any]) -> str:
    """For people, from what ``metrics.json`` has."""
    setting, share = kept["setting"], kept["small"] / kept["dense"]
    wanted = f"{kept['asked']:.0%} of the dense network's" if isinstance(kept["asked"], float) else kept["asked"]
    over = kept["small"] / kept["limit"] - 1.0
    verdict = f"{over:.1%} above the budget" if over > 0 else f"{-over:.1%} below the budget"
    if over < -STAIR and kept.get("above"):
        verdict += f", the next step of the staircase takes {kept['above']:.3g} ms"
    precision = setting.get("precision", "f32")  # files from before there was another have none
    bits = "" if precision == "f32" else f", {precision}"
    threads = "one thread" if setting["threads"] == 1 else f"{setting['threads']} threads"
    return (
        f"Time: asked {wanted}, measured {share:.1%} ({kept['small']:.3g} of {kept['dense']:.3g} ms, "
        f"{1 / share:.2f}x faster; {verdict}), in {setting['runtime']} {setting['version']}{bits}, {threads}, "
        f"batch {setting['batch']}, on {setting['processor']}."
    )
