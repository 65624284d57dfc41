"""How far rooflines are from the profiles that were composed from measured kernels.

    python benchmarks/roofline.py [--fit] [--json FILE|-]

Prints, per built-in profile, the roofline's error at worked points: decode steps of 1, 32 and 128
sequences of 1,024 tokens, prefills of 2,048 and 8,192 tokens, and 32 decodes beside a chunk of 512.
The efficiencies are fitted to the A100, H100 and H200 profiles; the two RTX cards' profiles come
from another source and are not fitted to. `left out` is the error of a fit without that GPU.
`--fit` prints the efficiencies anew.
"""

import argparse
import json
import sys
from dataclasses import asdict, astuple, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from autopoiesis.twin.hardware import gpus, models
from autopoiesis.twin.latency import StepModel, at_speed, profile, profiles, step_s
from autopoiesis.twin.roofline import FITTED, Efficiency, composed, step_model

FITTED_TO = ("a100", "h100", "h200")
WORKED = ((1, 1024, 0), (32, 1024, 0), (128, 1024, 0), (0, 0, 2048), (0, 0, 8192), (32, 1024, 512))
"""Decoding sequences, their context, and the chunk of prefill."""
GRID = (
    *((d, c, 0) for d in (1, 8, 32, 128, 256) for c in (256, 1024, 4096)),
    *((0, 0, k) for k in (256, 512, 2048, 8192)),
    *((d, 1024, k) for d in (8, 32, 128) for k in (128, 512, 2048)),
)
"""Points that the efficiencies are fitted at."""
COEFFICIENT_WEIGHT = 0.15
"""Weight of a coefficient's own error in the fit, against a step's."""
EXPECTED = Efficiency(
    weights=0.8, compute=0.8, compute_fp8=0.65, kv=0.9, pair=0.7, head=0.7, link=0.7,
    elementwise=0.8, prefill=6.0, layer_s=2e-5, allreduce_s=6e-6, decode_layer_s=1.2e-5,
    decode_head_s=3e-9, mixed_layer_s=1.3e-5, knee=2.5, knee_parallel=0.3, knee_fp8=0.75,
)  # fmt: skip
"""What one would expect; it decides where the profiles leave a choice, as between link and latency."""
EXPECTED_WEIGHT = 0.2
SHARES = ("weights", "compute", "compute_fp8", "kv", "pair", "head", "link", "elementwise")
"""At most 1."""


def steps_s(model: StepModel, points: tuple[tuple[int, int, int], ...]) -> NDArray[np.float64]:
    c = at_speed(model, 1.0)
    return np.array(
        [
            step_s(c, d + k, d + (k > 0), d + (k > 0), d, d * ctx, k, 0.5 * k * k, 0)
            for d, ctx, k in points
        ]
    )


def built_in(*prefixes: str) -> list[str]:
    return [name for name in profiles() if name.startswith(prefixes)]


def of_roofline(name: str, reached: Efficiency) -> StepModel:
    gpu, rest = name.split("-", 1)
    model, tp, precision = rest.rsplit("-", 2)
    return step_model(gpus()[gpu], models()[model], int(tp[2:]), precision, reached)


def fitted(names: list[str]) -> Efficiency:
    measured = {name: profile(name).step for name in names}
    expected = np.log(np.array(astuple(EXPECTED)))

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        reached = Efficiency(*np.exp(logs))
        off = [EXPECTED_WEIGHT * (logs - expected)]
        for name, step in measured.items():
            ours = of_roofline(name, reached)
            off.append(np.log(steps_s(ours, GRID) / steps_s(step, GRID)))
            a, b = ours.as_array(), step.as_array()
            both = (a > 0) & (b > 0)
            off.append(COEFFICIENT_WEIGHT * np.log(a[both] / b[both]))
        return np.concatenate(off)

    most = np.where(np.array([f.name in SHARES for f in fields(Efficiency)]), 0.0, np.inf)
    fit = least_squares(residuals, expected, bounds=(-np.inf, most), loss="soft_l1", f_scale=0.1)
    return Efficiency(*np.exp(fit.x))


def errors(name: str, reached: Efficiency = FITTED) -> NDArray[np.float64]:
    return steps_s(of_roofline(name, reached), WORKED) / steps_s(profile(name).step, WORKED) - 1


def table() -> list[dict[str, object]]:
    without = {
        gpu: fitted([n for n in built_in(*FITTED_TO) if not n.startswith(gpu)]) for gpu in FITTED_TO
    }
    rows: list[dict[str, object]] = []
    for name in built_in(*(f"{gpu}-" for gpu in gpus())):
        off = errors(name)
        left_out = without.get(name.split("-")[0])
        rows.append(
            {
                "profile": name,
                "errors": off.tolist(),
                "mean": float(np.abs(off).mean()),
                "left_out": float(np.abs(errors(name, left_out)).mean()) if left_out else None,
                "kv_blocks": composed(name).kv_blocks / profile(name).kv_blocks - 1,
            }
        )
    return rows


def printed(row: dict[str, object]) -> str:
    shown = "".join(f"{e:+12.1%}" for e in row["errors"])
    left_out = "-" if row["left_out"] is None else f"{row['left_out']:.1%}"
    return f"{row['profile']:<34}{shown}{row['mean']:9.1%}{left_out:>10}{row['kv_blocks']:+11.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies and print them")
    parser.add_argument("--json", metavar="FILE|-", help="write the table as JSON")
    options = parser.parse_args()
    if options.fit:
        for field, value in asdict(fitted(built_in(*FITTED_TO))).items():
            print(f"    {field}={value:.3g},")
        return
    rows = table()
    if options.json == "-":
        json.dump(rows, sys.stdout, indent=1)
        return
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    points = "".join(
        f"{f'{d}x{c}' if d else ''}{f'+{k}' if k else ''}".rjust(12) for d, c, k in WORKED
    )
    print(f"{'profile':<34}{points}{'mean':>9}{'left out':>10}{'KV blocks':>11}")
    for row in rows:
        print(printed(row))


if __name__ == "__main__":
    main()
