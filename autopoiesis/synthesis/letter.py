"""A brief in words, for an author who can read: objective, fleet, traffic, rivals, lessons.

The texts are the templates in `prompts/`; `$name` in them is one of the sections made here. What is
too long is told in less detail, never cut in the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template
from typing import NamedTuple

import numpy as np

from autopoiesis.arms.card import language_card
from autopoiesis.arms.slow_card import slow_card
from autopoiesis.synthesis.brief import Brief, Lesson
from autopoiesis.synthesis.proposer import Parent

MOST_BYTES = 48_000
"""Of a letter or a request, the language included."""
LONGEST_REASON = 300
MOST_REPLICAS = 16
"""Replicas that are told one by one."""

_ANSWER_MANY = (
    "Write $n whole policies that differ in their idea, each in a fenced block of its own that begins with "
    "```python. Say in one comment line at the top of each what is new about it and why it should win. Do not "
    "repeat a policy from above."
)
_ANSWER_ONE = (
    "Write one whole policy in one fenced block that begins with ```python. Say in one comment line at its top "
    "what is new about it and why it should win. Do not repeat a policy from above."
)

_PLANS = (
    "GPUs come and go, and slow functions are judged together with the fast ones: write both into the same block. "
    "The time that `schedule` takes (CPU time) passes while the old plan serves on; replicas that drain, stop or "
    "start serve nothing meanwhile."
)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True, slots=True)
class _Detail:
    """How much is told."""

    policies: int
    results: int
    lessons: int
    diagnosis: bool = True
    language: bool = True


_DETAILS = (
    _Detail(policies=4, results=20, lessons=16),
    _Detail(policies=3, results=12, lessons=10),
    _Detail(policies=2, results=8, lessons=6),
    _Detail(policies=1, results=4, lessons=4),
    _Detail(policies=1, results=4, lessons=2, diagnosis=False),
    _Detail(policies=1, results=2, lessons=0, diagnosis=False, language=False),
)


def letter(brief: Brief, parents: Sequence[Parent]) -> str:
    """Describe what is wanted to whoever finds it in a folder. `parents` are ordered best first."""
    text = ""
    plans = f"\n\n{_PLANS}\n\n{slow_card()}" if brief.yards else ""
    for detail in _DETAILS:
        text = _fill("letter.md", brief, parents, detail) + plans
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def request(
    brief: Brief, parents: Sequence[Parent], policies: int, most_bytes: int = MOST_BYTES
) -> tuple[Message, ...]:
    """Ask a language model for a number of policies, in at most so many bytes.

    The least detailed form is returned even if it is longer.
    """
    wanted = Template(_ANSWER_MANY if policies > 1 else _ANSWER_ONE).substitute(n=policies)
    count = f"{policies} better serving policies" if policies > 1 else "a better serving policy"
    if brief.yards:
        wanted = f"{_PLANS}\n\n{slow_card()}\n\n{wanted}"
    messages: tuple[Message, ...] = ()
    for detail in _DETAILS:
        messages = (
            *system_message(detail.language),
            Message(
                "user", _fill("request.md", brief, parents, detail, answer=wanted, count=count)
            ),
        )
        if sum(len(m.content.encode()) for m in messages) <= most_bytes:
            break
    return messages


def repair(source: str, reason: str, most_bytes: int = MOST_BYTES) -> tuple[Message, ...]:
    """Ask a language model to correct a policy that was refused for `reason`."""
    text = _template("repair.md").substitute(source=source.strip(), reason=reason)
    whole = (*system_message(), Message("user", text))
    return whole if sum(len(m.content.encode()) for m in whole) <= most_bytes else whole[1:]


def system_message(language: bool = True) -> tuple[Message, ...]:
    """Return the standing part of a conversation; without the language where there is no room."""
    if not language:
        return ()
    return (Message("system", _template("system.md").substitute(language=language_card())),)


def _fill(
    template: str, brief: Brief, parents: Sequence[Parent], detail: _Detail, **more: str
) -> str:
    shown = shown_parents(parents)[: detail.policies]
    return _template(template).substitute(
        why=brief.trigger,
        objective=_objective(brief),
        fleet=_fleet(brief),
        traffic="\n".join(_window(brief, i) for i in range(len(brief.windows))),
        results=_results(parents[: detail.results], len(brief.windows)),
        policies="\n\n".join(map(_policy, shown)) or "None has been raced yet.",
        diagnosis=(detail.diagnosis and brief.diagnosis) or "Not told.",
        lessons="\n".join(map(_lesson, brief.lessons[: detail.lessons])) or "Nothing yet.",
        language=language_card() if detail.language else "",
        **more,
    )


@cache
def _template(name: str) -> Template:
    return Template((files("autopoiesis.synthesis") / "prompts" / name).read_text("utf-8"))


def shown_parents(parents: Sequence[Parent]) -> list[Parent]:
    """Return whose source is worth reading: the two best, then those that beat the best somewhere.

    A policy that loses in the mean but wins a window knows something that the best does not.
    """
    best, others = list(parents[:2]), list(parents[2:])
    if not best:
        return []
    others.sort(key=lambda other: _advantage(other, best[0]), reverse=True)
    return best + others


def _advantage(other: Parent, best: Parent) -> float:
    """Return by how much `other` beats the best in the window that suits it most."""
    pairs = zip(other.by_window, best.by_window, strict=False)
    return max((a - b for a, b in pairs if a is not None and b is not None), default=-np.inf)


def _objective(brief: Brief) -> str:
    slo = brief.objective
    return (
        f"Utility of a request: min(1, {slo.slo_ttft_s:g} s / TTFT) * min(1, {slo.slo_tpot_s:g} s / TPOT), where "
        "TTFT is the time to the first token and TPOT the time per token after it. Refused and failed requests "
        f"have none. A new policy must gain at least {brief.min_gain:g} in the mean over the best one below."
    )


def _fleet(brief: Brief) -> str:
    lines = [f"{len(brief.replicas)} replicas:", ""]
    for spec in brief.replicas[:MOST_REPLICAS]:
        p = spec.profile
        lines.append(
            f"* {spec.name}: {p.name}, speed {spec.speed:g}, KV cache of {p.kv_tokens} tokens, at most "
            f"{p.max_num_seqs} sequences and {p.max_num_batched_tokens} tokens a step"
        )
    return "\n".join(lines)


def _window(brief: Brief, i: int) -> str:
    trace = brief.windows[i]
    counts = brief.counting(trace)
    inputs, outputs = trace.input_tokens[counts], trace.output_tokens[counts]
    span_s = max(float(trace.arrival_s[-1]) - brief.warmup_s, 1e-9)
    return (
        f"{i + 1}. {len(inputs)} requests in {span_s:.1f} s; prompts of {np.mean(inputs):.0f} tokens on average "
        f"(99 % below {np.percentile(inputs, 99):.0f}), answers of {np.mean(outputs):.0f} "
        f"(99 % below {np.percentile(outputs, 99):.0f})"
    )


def _results(parents: Sequence[Parent], windows: int) -> str:
    numbers = " | ".join(str(i + 1) for i in range(windows))
    lines = [f"| policy | against the best incumbent | {numbers} |", "| --- " * (windows + 2) + "|"]
    for parent in parents:
        gain = "not raced" if parent.gain is None else f"{parent.gain:+.4f}"
        utilities = parent.by_window or (None,) * windows
        cells = " | ".join("-" if u is None else f"{u:.3f}" for u in utilities)
        lines.append(f"| {parent.name} | {gain} | {cells} |")
    return "\n".join(lines)


def _policy(parent: Parent) -> str:
    return f"### {parent.name}\n\n```python\n{parent.text.rstrip()}\n```"


def _lesson(lesson: Lesson) -> str:
    thought = f'"{_one_line(lesson.thought)}": ' if lesson.thought else ""
    return f"* {thought}refused by {lesson.gate}: {_one_line(lesson.reason)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]
