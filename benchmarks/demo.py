"""How long ``espalier demo`` takes: digits, dense training, a profile and TCP to half of the time, export and report.

python -m benchmarks.demo     # with two threads, once; writes benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import environment, rounded, write_results

LIMIT = 180  # seconds on two cores, after installation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    before = environment()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "espalier", "demo", "--out", str(out)], check=True)
        seconds = time.monotonic() - began
        metrics = json.loads((out / "metrics.json").read_text())
    content = {"seconds": seconds, "limit": LIMIT, "left": metrics["fraction"], "environment": before}
    write_results("demo", rounded(content))
    print(f"{seconds:.0f} s of {LIMIT}")


if __name__ == "__main__":
    main()
