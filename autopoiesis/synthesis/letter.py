"""A brief in words, for an author who can read: the language, the fleet, the traffic, the rivals."""

import ast
import inspect
from collections.abc import Sequence

import numpy as np

from autopoiesis.arms import features
from autopoiesis.arms.language import CALLS
from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.proposer import Parent

_MEANING = {
    "score": "required; lower is better: the replica with the lowest score gets the request",
    "admit": "above 0 the request is served, otherwise it is refused at once (utility 0)",
    "priority": "order of held requests, lower goes first; without it the longest wait goes first",
    "ceiling": "requests in flight at this replica above which new ones are held at the gateway",
}


def language_card() -> str:
    """Describe the policy language with every feature and its unit."""
    lines = ["A policy is a file of at most four functions in a small subset of Python:", ""]
    for name, parameters in features.FUNCTIONS.items():
        lines.append(f"    def {name}({', '.join(parameters)}):  # {_MEANING[name]}")
    lines += [
        "",
        "Allowed: assignment to local names, if/elif/else, `a if condition else b`, + - * / % **, comparisons and",
        f"and/or/not in conditions, numbers, the features below, and the functions {', '.join(CALLS)}.",
        "Nothing else: no loops, no imports, no text, no state. Every value is one float; division by zero is total.",
        "A comment at the top of the file is kept as what you say of the policy.",
        "",
    ]
    for name, fields in _documented_features().items():
        lines += [f"    {name}.{field}: {meaning}" for field, meaning in fields]
    return "\n".join(lines)


def letter(brief: Brief, parents: Sequence[Parent]) -> str:
    """Describe what is wanted. `parents`: policies with what is known of them, best first."""
    speeds = ", ".join(
        f"{spec.name}: {spec.profile.name}, speed {spec.speed:g}" for spec in brief.replicas
    )
    slo = brief.objective
    parts = [
        "# Wanted: a better serving policy",
        f"Why now: {brief.trigger}",
        "Write it as NAME.policy into this folder; NAME.verdict will tell what came of it.",
        "## Objective",
        f"Utility of a request: min(1, {slo.slo_ttft_s:g} s / TTFT) * min(1, {slo.slo_tpot_s:g} s / TPOT).",
        "Refused and failed requests have none.",
        f"A new policy must gain at least {brief.min_gain:g} in the mean over the best one below.",
        "## Fleet",
        f"{len(brief.replicas)} replicas ({speeds}).",
        "## Recent traffic, oldest window first",
        *(_describe_window(i, brief) for i in range(len(brief.windows))),
        "## Language",
        language_card(),
        "## Policies to beat, best first",
        *(_describe_parent(parent) for parent in parents),
    ]
    return "\n\n".join(parts) + "\n"


def _describe_window(i: int, brief: Brief) -> str:
    trace = brief.windows[i]
    counts = brief.counting(trace)
    inputs, outputs = trace.input_tokens[counts], trace.output_tokens[counts]
    span_s = max(float(trace.arrival_s[-1]) - brief.warmup_s, 1e-9)
    return (
        f"{len(inputs)} requests in {span_s:.1f} s; prompts of {np.mean(inputs):.0f} tokens on average "
        f"(99 % below {np.percentile(inputs, 99):.0f}), answers of {np.mean(outputs):.0f} "
        f"(99 % below {np.percentile(outputs, 99):.0f})"
    )


def _describe_parent(parent: Parent) -> str:
    known = (
        "not raced"
        if parent.gain is None
        else f"utility {parent.gain:+.4f} against the best incumbent"
    )
    return f"### {parent.name} ({parent.id}): {known}\n\n```python\n{parent.source.rstrip()}\n```"


def _documented_features() -> dict[str, list[tuple[str, str]]]:
    """Return (field, meaning) per parameter, from the docstrings beside the features."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter, (declared, _) in features.INPUTS.items():
        body = ast.parse(inspect.getsource(declared)).body[0]
        assert isinstance(body, ast.ClassDef)
        pairs: list[tuple[str, str]] = []
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                pairs.append((field.target.id, " ".join(str(text.value.value).split())))
        found[parameter] = pairs
    return found
