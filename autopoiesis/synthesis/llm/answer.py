"""Policies out of what a model says: models wrap them in prose, and do not always finish."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from autopoiesis.arms.language import thought_of

MOST_POLICIES = 24
"""Taken out of one answer."""
LONGEST_SOURCE = 40_000
"""Characters of a policy that are looked at; the languages allow less."""
LONGEST_THOUGHT = 300

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_FENCE = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_DEFINES = re.compile(r"^[ \t]*def[ \t]", re.MULTILINE)
_CODE = re.compile(r"(?:def |#|[ \t]+\S|\s*$)")


@dataclass(frozen=True, slots=True)
class Draft:
    """A policy as it was found in an answer, unchecked."""

    source: str
    thought: str
    """What its author says of it: one line."""


def drafts_in(text: str) -> list[Draft]:
    """Return the policies in an answer, at most `MOST_POLICIES`.

    Each stands in a fenced block; where there is no fence, the first stretch of code is taken.
    """
    text = _THINKING.sub("", text)
    blocks = [(match[2], text[: match.start()]) for match in _FENCE.finditer(text)]
    if not blocks:
        blocks = list(_unfenced(text))
    found = [
        Draft(source[:LONGEST_SOURCE], _thought(source, before))
        for source, before in blocks
        if _DEFINES.search(source)
    ]
    return found[:MOST_POLICIES]


def _unfenced(text: str) -> Iterator[tuple[str, str]]:
    """Find code that stands among prose: from the first definition (or a comment right above) on."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith("def ")), None)
    if first is None:
        return
    start = first
    while start and lines[start - 1].startswith("#"):
        start -= 1
    end = first
    while end < len(lines) and _CODE.match(lines[end]):
        end += 1
    yield "\n".join(lines[start:end]) + "\n", "\n".join(lines[:start])


def _thought(source: str, before: str) -> str:
    """Return what the policy says of itself, or else the last line of prose before it."""
    said = thought_of(source) or next(
        (line for line in reversed(before[-2000:].split("\n")) if line.strip(" \t`~")), ""
    )
    plain = " ".join("".join(c if " " <= c <= "~" else " " for c in said).split())
    return plain.strip("#*: ")[:LONGEST_THOUGHT]
