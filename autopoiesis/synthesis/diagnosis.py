"""Why a policy scores what it scores: where the time of its requests goes in the twin.

A score says that a policy is bad; an author who can read needs to see what it does to whom.
"""

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.proposer import Parent
from autopoiesis.twin.outcome import LOST, Outcome, Status
from autopoiesis.twin.simulation import run_arm

WORST = 8
"""Requests that are shown one by one."""
MOST_REPLICAS = 16
"""Replicas that are shown one by one."""

Floats = NDArray[np.float64]


def diagnosis(brief: Brief, parent: Parent) -> str:
    """Describe what becomes of the newest recent window under a policy."""
    trace = brief.windows[-1]
    program = compile_policy(verify(parent.source))
    whole = run_arm(trace, brief.replicas, program, brief.objective, brief.seed)
    outcome = whole.select(brief.counting(trace))
    names = [spec.name for spec in brief.replicas]
    return "\n\n".join(
        [
            f"The newest window under {parent.name}:",
            _losses(outcome, brief.objective),
            _time(outcome),
            _replicas(outcome, names),
            _worst(outcome, brief.objective, names),
        ]
    )


def _losses(outcome: Outcome, objective: Objective) -> str:
    """Say which part of the utility is lost to what."""
    n = len(outcome.status)
    done = outcome.status == Status.COMPLETED
    first = objective.utility(outcome.ttft_s, np.full(n, np.nan))
    both = objective.utility(outcome.ttft_s, outcome.tpot_s)
    shed, failed = (outcome.status == Status.SHED).mean(), np.isin(outcome.status, LOST).mean()
    late = np.where(done, 1.0 - first, 0.0).mean()
    slow = np.where(done, first - both, 0.0).mean()
    return (
        f"{n} requests, mean utility {np.where(done, both, 0.0).mean():.4f}. Lost to refusing requests "
        f"{shed:.4f}, to failed ones {failed:.4f}, to late first tokens {late:.4f}, to slow tokens after "
        f"the first {slow:.4f}."
    )


def _time(outcome: Outcome) -> str:
    """Say where the time to the first token and between tokens goes."""
    held = outcome.dispatched_s - outcome.arrival_s
    engine = outcome.first_token_s - outcome.dispatched_s
    parts = {
        "held at the gateway": held,
        "queued and computing the prompt at the replica": engine,
        "time to first token": outcome.ttft_s,
        "time per token after the first": outcome.tpot_s,
    }
    rows = [f"| {what} | {_spread(values)} |" for what, values in parts.items()]
    known = outcome.replica >= 0
    prompts = outcome.input_tokens[known].sum()
    share = outcome.cached_tokens[known].sum() / prompts if prompts else 0.0
    head = "| time [s] | mean | median | 99 % below |\n| --- | --- | --- | --- |\n"
    return f"{head}{chr(10).join(rows)}\n\n{share:.1%} of the prompt tokens were in a prefix cache."


def _replicas(outcome: Outcome, names: list[str]) -> str:
    rows: list[str] = []
    for r, name in enumerate(names[:MOST_REPLICAS]):
        here = outcome.select(outcome.replica == r)
        ttft = _spread(here.ttft_s).split(" | ", maxsplit=1)[0]
        tokens = here.input_tokens.sum() - here.cached_tokens.sum()
        rows.append(f"| {name} | {len(here.status)} | {tokens} | {ttft} |")
    head = (
        "| replica | requests | prompt tokens computed | mean TTFT [s] |\n| --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def _worst(outcome: Outcome, objective: Objective, names: list[str]) -> str:
    """Show the requests that lost most."""
    done = outcome.status == Status.COMPLETED
    utility = np.where(done, objective.utility(outcome.ttft_s, outcome.tpot_s), 0.0)
    rows: list[str] = []
    for i in np.argsort(utility, kind="stable")[:WORST].tolist():
        at = int(outcome.replica[i])
        where = names[at] if at >= 0 else Status(outcome.status[i]).name.lower()
        held_s = float(outcome.dispatched_s[i] - outcome.arrival_s[i])
        times = (held_s, float(outcome.ttft_s[i]), float(outcome.tpot_s[i]))
        rows.append(
            f"| {outcome.arrival_s[i]:.2f} | {outcome.input_tokens[i]} | {outcome.cached_tokens[i]} | "
            f"{outcome.output_tokens[i]} | {where} | {' | '.join(map(_shown, times))} | {utility[i]:.3f} |"
        )
    head = (
        "The requests that lost most:\n\n| arrived [s] | prompt | cached | answer | replica | held [s] | "
        "TTFT [s] | TPOT [s] | utility |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *rows])


def _spread(values: Floats) -> str:
    there = values[~np.isnan(values)]
    if not len(there):
        return "- | - | -"
    return " | ".join(_shown(x) for x in (there.mean(), *np.percentile(there, (50, 99))))


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
