"""What ``make bench-quick`` runs: every benchmark that needs no data set, in its short form, in a few minutes."""

from __future__ import annotations

import subprocess
import sys

SHORT = (
    (
        "structure",
        "--networks",
        "resnet18",
        "mobilenet_v2",
        "cifar:resnet20",
        "--repeats",
        "3",
        "--name",
        "quick_structure",
    ),
    ("budgets", "--networks", "resnet18", "mobilenet_v2", "--targets", "5", "--name", "quick_budgets"),
    ("alignment", "--networks", "cifar:resnet20", "mobilenet_v2", "--seconds", "3", "--name", "quick_alignment"),
    ("removal", "--digits-epochs", "5", "--name", "quick_removal"),
)


def main() -> None:
    """Run them one after another; the first that fails ends it with its exit code."""
    for module, *options in SHORT:
        print(f"\n== {module}", flush=True)
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *options], check=False).returncode
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
