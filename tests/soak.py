"""``python tests/soak.py N [FIRST] [--record]``: prove N random networks, of seeds FIRST, FIRST + 1, ...; exit code 1 if not.

``--record`` writes what came of it to ``benchmarks/results/soak.json``, which ``docs/results.md`` reads.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from networks import random_network
from test_random_networks import prove_case, random_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    count, first = options.count, options.first
    started, failed, seen = time.monotonic(), [], Counter()
    for seed in range(first, first + count):
        pick = random.Random(seed).choice
        recipe, case = random_network(pick), random_case(pick)
        try:
            seen.update(prove_case(recipe, case))
        except Exception as error:
            failed.append(seed)
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"seed {seed}: {type(error).__name__}: {error}\n  at {where.filename}:{where.lineno}\n  {recipe}\n  {case}",
                flush=True,
            )
        if (seed - first + 1) % 500 == 0:
            print(f"{seed - first + 1} networks, {len(failed)} failed, {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{count} networks from seed {first}: {len(failed)} failed {failed[:20]}; "
        + ", ".join(f"{k} {v}" for k, v in seen.most_common())
    )
    if options.record:
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from benchmarks.common import environment, write_results

        content = {
            "networks": count,
            "first": first,
            "failed": failed,
            "seen": dict(seen),
            "environment": environment(),
        }
        write_results("soak", {**content, "seconds": round(time.monotonic() - started)})
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
