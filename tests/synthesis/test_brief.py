"""Briefs travel as bytes, are checked on arrival, and hide the hold-out from proposers."""

from dataclasses import fields, replace

import numpy as np
import orjson
import pytest
from synthesis_scenes import ROUND_ROBIN, poisson, uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.card import language_card
from autopoiesis.synthesis.brief import Brief, BriefError, Lesson, cut
from autopoiesis.synthesis.letter import letter
from autopoiesis.synthesis.proposer import Parent


def same_trace(a, b) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_a_brief_survives_the_trip():
    lessons = (Lesson("race", "behind", "less of it"),)
    brief = replace(
        uneven_brief(),
        known=("abc", "def"),
        synthesizer=Origin.FILES,
        folder="/x",
        lessons=lessons,
        diagnosis="slow",
    )
    there = Brief.from_bytes(brief.to_bytes())
    for field in fields(Brief):
        if field.name not in {"windows", "holdout"}:
            assert getattr(there, field.name) == getattr(brief, field.name), field.name
    for name in ("windows", "holdout"):
        pairs = zip(getattr(brief, name), getattr(there, name), strict=True)
        assert all(same_trace(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"trigger": "x"}',
        uneven_brief().to_bytes()[:-2],
        uneven_brief().to_bytes().replace(b'"genetic"', b'"astrology"'),
        uneven_brief().to_bytes().replace(b'"seed"', b'"sead"'),
        uneven_brief().to_bytes().replace(b'"base64":"', b'"base64":"AA'),
    ],
)
def test_other_bytes_are_refused_in_one_sentence(data):
    with pytest.raises(BriefError, match="This is not a brief") as caught:
        Brief.from_bytes(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"incumbents": ()}, "at least one incumbent"),
        ({"replicas": ()}, "at least one replica"),
        ({"windows": uneven_brief().windows[:1]}, "at least 2 windows"),
        ({"warmup_s": 99.0}, "no request after its warm-up"),
        ({"budget_s": 0.0}, "budget above 0 s"),
        ({"max_candidates": 0}, "at least 1 candidate"),
    ],
)
def test_a_brief_that_cannot_be_worked_on_is_refused(changes, sentence):
    with pytest.raises(BriefError, match=sentence):
        replace(uneven_brief(), **changes)


def test_a_trace_is_cut_into_windows_that_count_every_request_once():
    trace = poisson(20.0, 100.0, 3)
    windows, holdout = cut(trace, window_s=10.0, warmup_s=2.5, holdout_every=3)
    pieces = [*windows, *holdout]
    counted = sum(int((p.arrival_s >= 2.5).sum()) for p in pieces)
    assert counted == int((trace.arrival_s >= 2.5).sum())
    assert (len(windows), len(holdout)) == (7, 3)
    assert windows[-1].name == "poisson[-0]"
    assert [p.name for p in holdout] == ["poisson[-8]", "poisson[-5]", "poisson[-2]"]
    kept = cut(trace, window_s=10.0, at_most=4)
    assert len(kept[0]) + len(kept[1]) == 4


def test_the_letter_tells_all_but_the_holdout():
    brief = uneven_brief()
    parent = Parent("0123456789ab", ROUND_ROBIN, "round-robin", -0.01)
    lesson = Lesson("race", "behind round-robin after 3 replays", "random is fair")
    blind = brief.for_proposers(lessons=(lesson,), diagnosis="r3 is slow")
    text = letter(blind, [parent])
    for part in (
        "regret above 0.05",
        "0.3 s / TTFT",
        "speed 0.25",
        ROUND_ROBIN.strip(),
        "r3 is slow",
    ):
        assert part in text
    assert '"random is fair": refused by race: behind round-robin' in text
    assert language_card() in text
    assert blind.holdout == ()
    assert len(text) < 12_000
    assert orjson.loads(blind.to_bytes())["holdout"] == []
