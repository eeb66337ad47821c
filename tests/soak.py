"""``python tests/soak.py N [FIRST]``: prove N random networks, seeds FIRST, FIRST + 1, ...; exit code 1 if any fails."""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections import Counter

from networks import random_network
from test_random_networks import prove_case, random_case


def main(count: int, first: int = 0) -> int:
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
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
