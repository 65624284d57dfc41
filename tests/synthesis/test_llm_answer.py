"""Policies are found in whatever a model wraps them in."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_endpoint import GOOD, PROSE, fenced

from autopoiesis.synthesis.llm.answer import LONGEST_SOURCE, MOST_POLICIES, drafts_in


def test_each_fenced_block_is_a_policy_with_its_thought():
    bare = GOOD.split("\n", 1)[1]
    text = (
        f"First idea.\n```python\n{GOOD}```\nSecond: **pick the fastest**\n\n~~~\n{bare}~~~\nDone."
    )
    first, second = drafts_in(text)
    assert (first.source, first.thought) == (GOOD, "Less work for slow replicas.")
    assert (second.source, second.thought) == (bare, "Second: **pick the fastest")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Sure:\n{GOOD}\nThis balances the load.",
        f"```\n{GOOD}",
        f"<think>\n```python\ndef score(draft): ...\n```\n</think>\n```py\n{GOOD}```",
        f"```json\n{{}}\n```\n```python\n{GOOD}```",
        f"  ```python\r\n{GOOD}  ```",
    ],
)
def test_a_policy_is_found_with_or_without_fences(text):
    (draft,) = drafts_in(text)
    assert draft.source.strip() == GOOD.strip()


@pytest.mark.parametrize(
    "text", ["", PROSE, "```\nnothing\n```", "```", "def", "<think>def score(", "```\n" * 9]
)
def test_prose_holds_no_policy(text):
    assert drafts_in(text) == []


def test_what_is_taken_is_bounded():
    assert len(drafts_in(fenced(*[GOOD] * 500))) == MOST_POLICIES
    (long,) = drafts_in("```python\ndef score():\n" + "x" * (1 << 20))
    assert len(long.source) == LONGEST_SOURCE
    assert len(long.thought) <= 300


@given(st.text(st.sampled_from("`~\n dfe#<think>/:x"), max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read(text):
    for draft in drafts_in(text):
        assert "def" in draft.source
