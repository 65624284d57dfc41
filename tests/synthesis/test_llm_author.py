"""The model author turns whatever models say into proposals, reasons and a bill, and never raises."""

from dataclasses import replace

import numpy as np
import pytest
from scripted_endpoint import BROKEN, GOOD, PROSE, fenced
from synthesis_scenes import uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.language import verify
from autopoiesis.synthesis.letter import MOST_BYTES
from autopoiesis.synthesis.llm.author import PATIENCE, SHORTEST_PROMPT_BYTES, ModelAuthor
from autopoiesis.synthesis.llm.conversation import Ask, Fault, Reply
from autopoiesis.synthesis.proposer import Parent
from autopoiesis.synthesis.step import step

SCORE = "def score(request, replica, fleet):\n    "
ATTACKS = [
    "import os\n" + SCORE + "return os.system('id')\n",
    SCORE + "return ().__class__.__bases__[0].__subclasses__()\n",
    SCORE + "return request.__class__\n",
    SCORE + "x = 9\n" + "    x = x * x\n" * 36 + "    return x\n",
    SCORE + "x = (replica.in_flight > 0) + 1\n    return x ** x ** x\n",
    SCORE + "return (-8.0) ** 0.5\n",
    SCORE + "return " + "-" * 5000 + "1\n",
    SCORE + "return " + " + ".join(["1"] * 5000) + "\n",
    SCORE + "return eval('1')\n",
    SCORE + "while True:\n        pass\n",
    SCORE + "return sum(range(10**10))\n",
    SCORE + "return f'{request}'\n",
    SCORE + "return (lambda: 1)()\n",
    SCORE + "return 1 << 9999999\n",
    SCORE + "return [x for x in (1,)][0]\n",
    SCORE + "raise SystemExit\n",
    "def score(request, replica, fleet, evil=print('x')):\n    return 1\n",
    SCORE + "return replica.in_flight.__init__.__globals__\n",
    SCORE + "return 1\n" + "\x00" * 100,
]
HARMLESS = {3, 5}
"""Attacks that are policies here: numbers are floats, powers are total."""
SAYS_NOTHING = 1
"""Of these, how many score every replica alike, with the largest number, and are refused for that."""


def says(*texts: str, **more) -> Reply:
    return Reply(texts, (False,) * len(texts), "small", tokens=100, cost_usd=0.01, **more)


def fails(fault: Fault, reason: str = "no.") -> Reply:
    return Reply(fault=fault, reason=reason, tokens=10, cost_usd=0.001)


class Correspondents:
    """Says what a script says, the last of it for ever, and notes what it was asked."""

    def __init__(self, *script: Reply) -> None:
        self.script, self.asks, self.verdicts = list(script), [], []

    def ask(self, ask: Ask, within_s: float) -> Reply:
        self.asks.append(ask)
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def judged(self, verdicts) -> None:
        self.verdicts = list(verdicts)


def proposals(
    *script: Reply, n: int = 24, policies: int = 4, grammar: bool = False, times: int = 1
):
    """Return the proposals of the last of some calls, the correspondent and the author."""
    other = Correspondents(*script)
    author = ModelAuthor(Origin.OPENAI, other, policies, grammar=grammar)
    brief = uneven_brief().for_proposers()
    parents = [Parent(i.arm_id, i.source, i.name, 0.0) for i in brief.incumbents]
    made = []
    for _ in range(times):
        made = author.propose(brief, parents, n, np.random.default_rng(0))
    return made, other, author


def test_policies_come_with_their_thought_model_and_share_of_the_bill():
    other = GOOD.replace("in_flight", "running")
    made, asked, author = proposals(says(fenced(GOOD, other)))
    assert [p.source for p in made] == [GOOD, other]
    assert {(p.origin, p.model, p.tokens, p.cost_usd) for p in made} == {
        ("openai", "small", 50, 0.005)
    }
    assert made[0].thought == "Less work for slow replicas."
    assert author.account.tokens == 100
    (ask,) = asked.asks
    system, user = (m.content for m in ask.messages)
    assert "| `replica.in_flight` |" in system
    for part in ("Write 4 whole policies", "regret above 0.05", "### round-robin"):
        assert part in user


def test_a_broken_policy_gets_exactly_one_repair_turn_with_the_verifiers_message():
    made, asked, _ = proposals(says(fenced(BROKEN, GOOD)), says(fenced(GOOD.replace("in_", "in_"))))
    assert len(asked.asks) == 2
    assert (
        "`replica` has no field `in_flite`; did you mean replica.in_flight?"
        in asked.asks[1].messages[1].content
    )
    assert asked.asks[1].model == "small"
    assert [verify(p.source).id for p in made] == [verify(GOOD).id] * 2
    assert "(repaired: line 3" in made[0].thought
    assert (made[0].tokens, made[1].tokens) == (150, 50)

    made, asked, author = proposals(says(fenced(BROKEN)), says(PROSE))
    assert len(asked.asks) == 2
    assert [p.source for p in made] == [BROKEN]

    made, asked, author = proposals(says(fenced(BROKEN)), says(fenced(BROKEN)))
    assert (len(asked.asks), len(made)) == (2, 1)
    made, asked, author = proposals(says(fenced(BROKEN)), fails(Fault.BUDGET, "all spent."))
    assert [p.source for p in made] == [BROKEN]
    assert "all spent." in author.account.remarks


@pytest.mark.parametrize("fault", [Fault.BUDGET, Fault.KEY, Fault.REFUSED, Fault.LATE, Fault.GONE])
def test_after_a_final_fault_nobody_is_asked_again(fault):
    made, asked, author = proposals(fails(fault, "it says why."), times=3)
    assert (made, len(asked.asks)) == ([], 1)
    assert author.account.remarks == ("it says why.",)
    assert author.account.tokens == 10


@pytest.mark.parametrize(
    "fault", [Fault.TIME, Fault.BUSY, Fault.BROKEN, Fault.NONSENSE, Fault.TRAFFIC]
)
def test_other_faults_are_borne_for_a_while(fault):
    made, asked, author = proposals(fails(fault, "it says why."), times=3)
    assert (made, len(asked.asks)) == ([], PATIENCE)
    assert author.account.remarks == (f"it says why. ({PATIENCE} times)",)
    made, asked, _ = proposals(fails(fault), says(fenced(GOOD)))
    assert [p.source for p in made] == [GOOD]


def test_prose_for_ever_and_the_same_policy_for_ever_end():
    made, asked, author = proposals(says(PROSE), times=5)
    assert (made, len(asked.asks)) == ([], PATIENCE)
    assert "answered without a policy" in author.account.remarks[0]
    _, asked, author = proposals(says(fenced(GOOD)), times=20)
    assert len(asked.asks) == PATIENCE + 1
    assert "held nothing new" in author.account.remarks[-1]


def test_a_prompt_that_does_not_fit_is_told_in_fewer_words():
    _, asked, author = proposals(fails(Fault.TOO_LONG, "too long."), times=1)
    sizes = [sum(len(m.content) for m in ask.messages) for ask in asked.asks]
    assert sizes[0] < MOST_BYTES
    assert sizes[-1] < sizes[0] / 2
    assert len(sizes) < 12 * PATIENCE
    assert "too long." in author.account.remarks[0]
    assert SHORTEST_PROMPT_BYTES < 3000
    made, asked, _ = proposals(fails(Fault.TOO_LONG), says(fenced(GOOD)))
    assert [p.source for p in made] == [GOOD]


def test_with_a_grammar_one_policy_is_asked_for_several_times():
    made, asked, _ = proposals(says(GOOD, BROKEN[:30], grammar=True), grammar=True, policies=3)
    assert (asked.asks[0].choices, asked.asks[0].grammar) == (3, True)
    assert "Write one whole policy" in asked.asks[0].messages[1].content
    assert made[0].source.strip() == GOOD.strip()


def test_attacks_are_refused_with_a_reason_or_are_harmless():
    brief = replace(uneven_brief(), max_candidates=len(ATTACKS), synthesizer=Origin.OPENAI)
    other = Correspondents(says(*(f"```python\n{a}```" for a in ATTACKS[:9])), says(PROSE))
    other.script[1:1] = [says(PROSE)] * 8
    row = step(brief, ModelAuthor(Origin.OPENAI, other, 24))
    assert row.error == ""
    refused = [c for c in row.candidates if c.gate == "verify"]
    assert len(refused) == 9 - len(HARMLESS) + SAYS_NOTHING
    for attack_number, attack in enumerate(ATTACKS):
        made, _, _ = proposals(says(f"```python\n{attack}```"), says(PROSE))
        assert len(made) == 1
        if attack_number not in HARMLESS:
            with pytest.raises(ValueError, match=r"line|bytes|deep|long|lines|operations|tokens"):
                verify(made[0].source)


def test_the_cycle_says_what_kept_the_author_from_writing():
    brief = replace(uneven_brief(), synthesizer=Origin.OPENAI)
    row = step(brief, ModelAuthor(Origin.OPENAI, Correspondents(fails(Fault.KEY, "Wrong key.")), 4))
    assert (row.promoted, row.candidates, row.error) == ((), (), "")
    assert row.conclusion.endswith("openai says: Wrong key.")
    assert (row.tokens, row.cost_usd) == (10, 0.001)


def test_what_answers_gained_is_told_to_whoever_chooses_models():
    brief = replace(uneven_brief(), synthesizer=Origin.OPENAI)
    other = Correspondents(
        says(fenced(GOOD)), says(fenced(SCORE + "return replica.speed\n")), says(PROSE)
    )
    row = step(brief, ModelAuthor(Origin.OPENAI, other, 4))
    assert row.promoted == (verify(GOOD).id,)
    first, second, *_ = other.verdicts
    assert (first.model, first.tokens) == ("small", 100)
    assert first.gain > 0.05
    assert second.gain is None
    lesson = next(a for a in other.asks[2:] if len(a.messages) == 2).messages[1].content
    assert "refused by screen" in lesson
    assert "The newest window under" in lesson
