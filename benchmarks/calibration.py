"""How well calibration finds a hidden profile again, and how well it predicts what it has not seen.

    python benchmarks/calibration.py [--seeds 8] [--json FILE|-]

The twin itself makes the recordings, under an H100 profile whose groups of coefficients were multiplied
by chance (0.2 to 5), with 5 % noise and 1 % of the requests five times too slow.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from recordings import H100, hidden, loads, record

from autopoiesis.twin.calibration import GROUPS, calibrate, replay

HTTP_S = 0.004


def measured(seed: int) -> dict[str, Any]:
    """Return the errors of one hidden profile: of predictions (median request), and of intervals."""
    rng = np.random.default_rng(seed)
    overall = math.exp(rng.uniform(-1.0, 1.0))
    factors: dict[str, float] = {}
    for names in GROUPS.values():
        factors |= dict.fromkeys(names, overall * math.exp(rng.uniform(-0.7, 0.7)))
    truth = hidden(factors, HTTP_S)
    trace = loads([rate / overall for rate in (3.0, 9.0, 6.0)], 120.0, seed)
    recording = record(truth, trace, seed)
    began_s = time.process_time()
    found = calibrate([recording], H100)
    took_s = time.process_time() - began_s
    pairs = zip(replay(recording, found.profile), replay(recording, truth), strict=True)
    ttft, tpot, e2e = (float(np.nanmedian(np.abs(ours / theirs - 1.0))) for ours, theirs in pairs)
    within = [
        c.low <= (HTTP_S if "." in c.name else getattr(truth.step, c.name)) <= c.high
        for c in found.coefficients
    ]
    return {
        "seed": seed, "requests": len(trace), "ttft": ttft, "tpot": tpot, "e2e": e2e,
        "within": float(np.mean(within)), "cpu_s": took_s,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    rows = [measured(seed) for seed in range(options.seeds)]
    if options.json == "-":
        json.dump(rows, sys.stdout, indent=1)
        return
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), "utf-8")
    share = float(np.mean([row["within"] for row in rows]))
    table = Table(title=f"{share:.0%} of the coefficients within their 90 % intervals")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        shown = [f"{row[name]:.1%}" for name in ("ttft", "tpot", "e2e", "within")]
        table.add_row(str(row["seed"]), str(row["requests"]), *shown, f"{row['cpu_s']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
