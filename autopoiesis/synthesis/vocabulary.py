"""What the genetic proposer writes with: features by unit, and terms that mean something.

Features are exchanged only within a unit, and every term knows its usual size, so that a weight of
about 1 makes a term matter beside another.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from autopoiesis.arms.features import FUNCTIONS, INPUTS

T = TypeVar("T")

UNITS: dict[str, tuple[str, ...]] = {
    "tokens": (
        "request.input_tokens",
        "request.predicted_output_tokens",
        "request.max_output_tokens",
        "replica.queued_prefill_tokens",
        "replica.decoding_tokens",
        "replica.prefix_hit_tokens",
        "fleet.input_tokens_mean",
    ),
    "requests": (
        "replica.in_flight",
        "replica.running",
        "replica.waiting",
        "fleet.in_flight",
        "fleet.held",
    ),
    "seconds": (
        "request.waited_s",
        "request.slack_s",
        "replica.ttft_ewma_s",
        "replica.tpot_ewma_s",
        "fleet.slo_ttft_s",
        "fleet.slo_tpot_s",
        "replica.age_s",
    ),
    "share": (
        "replica.kv_usage",
        "replica.error_rate",
        "replica.session_here",
        "fleet.kv_usage_mean",
        "fleet.prefix_share",
        "fleet.draw",
    ),
    "ratio": ("replica.speed", "fleet.arrival_burstiness"),
    "class": ("request.priority_class",),
    "rate": ("fleet.arrival_rate_rps",),
    "count": ("fleet.replicas",),
    "index": ("replica.position", "fleet.sequence"),
    "flag": ("replica.draining",),
}
"""Unit → features."""

USUAL: dict[str, float] = {
    "tokens": 1000.0,
    "requests": 8.0,
    "seconds": 0.5,
    "share": 0.5,
    "ratio": 1.0,
    "class": 1.0,
    "rate": 10.0,
    "count": 4.0,
    "index": 4.0,
    "flag": 1.0,
}
"""Unit → usual size of a feature."""

UNTRIED = frozenset({"replica.age_s", "replica.error_rate", "replica.draining"})
"""Features that are the same for all replicas in the twin's replays.

Nothing there would tell a good use of them from a ruinous one, so they are never written in.
"""

UNIT_OF: dict[str, str] = {
    feature: unit for unit, features in UNITS.items() for feature in features
}


@dataclass(frozen=True, slots=True)
class Term:
    """A meaningful expression and its usual size."""

    text: str
    usual: float
    """Negative where more of it is better."""


COSTS: tuple[Term, ...] = (
    Term("replica.in_flight", 8.0),
    Term("replica.in_flight / replica.speed", 8.0),
    Term("(replica.in_flight + 1.0) / replica.speed", 8.0),
    Term("replica.waiting", 4.0),
    Term("replica.running", 8.0),
    Term("replica.queued_prefill_tokens", 2000.0),
    Term("replica.queued_prefill_tokens / replica.speed", 2000.0),
    Term(
        "(replica.queued_prefill_tokens + request.input_tokens - replica.prefix_hit_tokens)"
        " / replica.speed",
        3000.0,
    ),
    Term("replica.decoding_tokens", 8000.0),
    Term("replica.decoding_tokens / replica.speed", 8000.0),
    Term("request.input_tokens / replica.speed", 1000.0),
    Term("request.predicted_output_tokens / replica.speed", 200.0),
    Term("replica.in_flight * replica.in_flight / replica.speed", 64.0),
    Term("replica.kv_usage", 0.5),
    Term("max(replica.kv_usage - 0.8, 0.0)", 0.1),
    Term("replica.ttft_ewma_s", 0.5),
    Term("replica.tpot_ewma_s", 0.05),
    Term("max(replica.tpot_ewma_s - fleet.slo_tpot_s, 0.0)", 0.05),
    Term("1.0 / replica.speed", 1.0),
    Term("replica.prefix_hit_tokens", -500.0),
    Term("replica.prefix_hit_tokens / replica.speed", -500.0),
    Term("replica.session_here", -0.5),
    Term("(replica.position - fleet.sequence) % fleet.replicas", 2.0),
    Term("fleet.draw * replica.in_flight", 4.0),
)
"""What makes a replica a worse choice (the more the worse)."""

REQUEST_TERMS: tuple[Term, ...] = (
    Term("request.input_tokens", 1000.0),
    Term("request.predicted_output_tokens", 200.0),
    Term("request.max_output_tokens", 1000.0),
    Term("request.priority_class", 1.0),
    Term("request.waited_s", -0.5),
    Term("request.slack_s", 0.5),
    Term("fleet.in_flight / fleet.replicas", 8.0),
    Term("fleet.held / fleet.replicas", 2.0),
    Term("fleet.held / max(fleet.arrival_rate_rps, 0.1)", 0.5),
    Term("fleet.arrival_rate_rps / fleet.replicas", 2.0),
    Term("fleet.kv_usage_mean", 0.5),
    Term("fleet.input_tokens_mean", 1000.0),
)
"""What may be said of a request and of the fleet alone."""


def choose(items: Sequence[T], rng: np.random.Generator) -> T:
    """Return one of the items, all equally likely."""
    return items[int(rng.integers(len(items)))]


def parameters(function: str) -> tuple[str, ...]:
    """Return the parameter names of one of a policy's functions."""
    return FUNCTIONS[function]


def available(function: str) -> list[str]:
    """Return the features that may be written into a function."""
    names = [f"{p}.{field}" for p in parameters(function) for field in INPUTS[p][0]._fields]
    return [name for name in names if name not in UNTRIED]


def expression(text: str) -> ast.expr:
    """Parse an expression."""
    return ast.parse(text, mode="eval").body


def number(value: float) -> ast.expr:
    """Return a constant with four significant digits; a negative one as a negation."""
    rounded = float(f"{value:.4g}")
    constant = ast.Constant(abs(rounded))
    return ast.UnaryOp(ast.USub(), constant) if rounded < 0.0 else constant


def weighted(term: Term, weight: float) -> ast.expr:
    """Return the term times a number, so that its usual size is `weight`."""
    return ast.BinOp(number(weight / term.usual), ast.Mult(), expression(term.text))


def random_term(function: str, rng: np.random.Generator, scale: float = 1.0) -> ast.expr:
    """Return one term for a function, of usual size about `scale`, mostly in its natural direction."""
    terms = (
        COSTS
        if function == "score" or (function == "ceiling" and rng.random() < 0.5)
        else REQUEST_TERMS
    )
    sign = scale if rng.random() < 0.9 else -scale
    return weighted(choose(terms, rng), sign * float(rng.lognormal(0.0, 1.0)))


def random_sum(function: str, rng: np.random.Generator) -> ast.expr:
    """Return a sum of one to four terms."""
    total = random_term(function, rng)
    for _ in range(int(rng.integers(0, 4))):
        total = ast.BinOp(total, ast.Add(), random_term(function, rng))
    return total


def random_function(function: str, rng: np.random.Generator) -> ast.FunctionDef:
    """Return a whole function of one of the shapes that make sense for it."""
    if function == "ceiling":
        result = _random_ceiling(rng)
    elif function == "admit":
        result = _random_admission(rng)
    else:
        result = random_sum(function, rng)
    return define(function, result)


def _random_ceiling(rng: np.random.Generator) -> ast.expr:
    """Let a replica have so many requests, or so many tokens of prompts that wait."""
    by_speed = " * replica.speed" if rng.random() < 0.7 else ""
    limit = f"{rng.lognormal(np.log(24.0), 0.8):.3g}{by_speed}"
    if rng.random() < 0.6:
        tokens = f"{rng.lognormal(np.log(2000.0), 0.8):.4g}{by_speed}"
        limit = f"{limit} if replica.queued_prefill_tokens < {tokens} else 0.0"
    return expression(limit)


def _random_admission(rng: np.random.Generator) -> ast.expr:
    """Refuse what comes when so many are there, or when those held will take too long."""
    k = rng.lognormal(0.0, 1.0)
    shapes = (
        f"{40.0 * k:.3g} - fleet.in_flight / fleet.replicas - fleet.held / fleet.replicas",
        f"{k:.3g} - fleet.held / fleet.replicas",
        f"{k:.3g} * fleet.slo_ttft_s - fleet.held / max(fleet.arrival_rate_rps, 0.1)",
    )
    return expression(choose(shapes, rng))


def deadline_order(rng: np.random.Generator) -> ast.expr:
    """Who is nearest to missing the first-token objective comes first; who will miss it anyway comes last."""
    prefill_s = f"request.input_tokens / {rng.lognormal(np.log(10000.0), 0.7):.4g}"
    slack_s = f"request.slack_s - {prefill_s}"
    return expression(f"{slack_s} if request.slack_s > {prefill_s} else 1000.0 - request.waited_s")


def define(function: str, result: ast.expr) -> ast.FunctionDef:
    """Return the function that returns an expression."""
    text = f"def {function}({', '.join(parameters(function))}):\n    return 0.0"
    made = ast.parse(text).body[0]
    assert isinstance(made, ast.FunctionDef)
    made.body = [ast.Return(result)]
    return made
