"""A recipe: one row of somebody's table, with the methods that are compared at its budget, as a TOML file.

``benchmarks/recipes/NAME.toml`` holds

- ``title``, ``published`` (what the source reports, for the reader), ``value`` (what is run first: higher), ``seeds``;
- ``needs`` = "cuda" where the run makes no sense on a CPU; ``headline`` = true for the table in the README;
- ``[model]`` name, and weights (a file of the published weights) or ``[start]``, a recipe for the dense network that is
  trained first and that the methods named in its ``for`` begin with; the others begin untrained; where the ``dense`` row is
  trained in just that way its network is taken;
- ``[data]``, ``[budget]``, ``[recipe]`` as in a run's ``config.toml``; ``data.choose_by`` = "holdout" marks a run that is
  there to choose a setting, and never sees the test set; ``data.train_images`` leaves so many images to train on;
- ``[methods.LABEL]`` with the name of a method - ``dense``, one of ``benchmarks.peers.PEERS``, or what ``espalier compress
  --method`` takes - and its options; a table ``recipe`` inside overrides ``[recipe]``, where equal terms need other epochs,
  and a table ``budget`` says in multiples of what widths are to be.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent / "recipes"
KNOWN = {
    "title",
    "published",
    "value",
    "seeds",
    "needs",
    "headline",
    "model",
    "start",
    "data",
    "budget",
    "recipe",
    "methods",
}


@dataclass(frozen=True)
class Job:
    """One method of one recipe with one seed: one run, one result file."""

    name: str  # of the recipe
    label: str  # of the method in it
    seed: int
    content: dict[str, Any]  # the whole recipe

    @property
    def key(self) -> str:
        return f"{self.name}.{self.label}-seed{self.seed}"

    @property
    def method(self) -> dict[str, Any]:
        return {k: v for k, v in self.content["methods"][self.label].items() if k not in ("recipe", "budget")}

    @property
    def recipe(self) -> dict[str, Any]:
        return {**self.content["recipe"], **self.content["methods"][self.label].get("recipe", {})}

    @property
    def budget(self) -> dict[str, Any]:
        return {**self.content["budget"], **self.content["methods"][self.label].get("budget", {})}

    @property
    def setting(self) -> dict[str, Any]:
        """Everything that the numbers depend on, but the seed."""
        parts = {part: self.content.get(part, {}) for part in ("model", "start", "data")}
        return {**parts, "budget": self.budget, "recipe": self.recipe, "method": self.method}

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def starts_trained(self) -> bool:
        return "weights" in self.content["model"] or self.label in self.content.get("start", {}).get(
            "for", [self.label]
        )

    @property
    def is_the_start(self) -> bool:
        """A dense row that is trained exactly as ``start`` would be: the methods that begin with ``start`` take its network."""
        start = {k: v for k, v in self.content.get("start", {}).items() if k != "for"}
        plain = {k: v for k, v in self.recipe.items() if (k, v) != ("distill", 0.0)}
        return bool(start) and self.method == {"name": "dense"} and not self.starts_trained and start == plain


def read_recipe(path: Path) -> dict[str, Any]:
    """Raises: ValueError that names the file and what is wrong with it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not TOML ({error})") from error
    missing = [k for k in ("title", "seeds", "model", "data", "budget", "recipe", "methods") if k not in content]
    unknown = sorted(content.keys() - KNOWN)
    if missing or unknown:
        raise ValueError(f"{path.name}: missing {missing}, unknown {unknown}; see benchmarks/recipe.py")
    return content


def read_recipes(folder: Path = RECIPES) -> dict[str, dict[str, Any]]:
    """All recipes by name, the most wanted first."""
    found = {path.stem: read_recipe(path) for path in sorted(folder.glob("*.toml"))}
    return dict(sorted(found.items(), key=lambda item: -item[1].get("value", 0)))


def jobs(recipes: dict[str, dict[str, Any]]) -> Iterable[Job]:
    """Recipe by recipe and seed by seed: all methods have a first seed before one has a second."""
    for name, content in recipes.items():
        for seed in content["seeds"]:
            for label in content["methods"]:
                yield Job(name, label, seed, content)
