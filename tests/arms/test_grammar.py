"""The grammar that engines get describes the language: neither more nor much less."""

import ast
import random
from collections import Counter

import pytest
from ebnf import accepts, read, sample

from autopoiesis.arms.features import FUNCTIONS, INPUTS
from autopoiesis.arms.grammar import LOCALS, MOST_LOCALS, policy_grammar
from autopoiesis.arms.language import CALLS, COMPARISONS, OPERATORS, PolicyError, verify
from autopoiesis.arms.seeds import seed_arms

RULES = read(policy_grammar())
SIZES = ("too long", "shorter policy", "too large", "nested over")


def in_grammar_names(source: str) -> str:
    """Write a canonical policy with its locals called a, b, c ... and its numbers without exponents."""
    tree = ast.parse(source)
    for function in tree.body:
        names: dict[str, str] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.setdefault(node.id, (LOCALS + "?")[len(names)])
        for node in ast.walk(function):
            if isinstance(node, ast.Name):
                node.id = names.get(node.id, node.id)
    return verify(ast.unparse(tree)).source


def test_what_the_grammar_says_verifies_or_is_refused_for_its_size_alone():
    rng = random.Random(7)
    refusals = Counter()
    for _ in range(120):
        sentence = sample(RULES, rng)
        try:
            verify(sentence)
        except PolicyError as error:
            refusals[next((s for s in SIZES if s in str(error)), str(error))] += 1
    assert set(refusals) <= set(SIZES), refusals
    assert refusals.total() < 24, refusals


@pytest.mark.parametrize("arm", seed_arms(), ids=lambda arm: arm.name)
def test_every_human_arm_is_a_sentence(arm):
    assert accepts(RULES, in_grammar_names(arm.source)), in_grammar_names(arm.source)


def test_what_it_samples_it_also_accepts():
    rng = random.Random(11)
    sentences = [sample(RULES, rng) for _ in range(20)]
    assert all(accepts(RULES, sentence) for sentence in sentences if len(sentence) < 2500)
    assert sum(len(sentence) < 2500 for sentence in sentences) > 5
    assert not accepts(RULES, "import os\n")
    assert not accepts(RULES, "def score(request, replica, fleet):\n    return a\n")
    assert not accepts(RULES, "def score(request, replica, fleet):\n    return replica.gold\n")


def test_every_rule_is_reached_and_every_word_of_the_language_is_in_it():
    used = set()
    ahead = [("rule", "root")]
    while ahead:
        x = ahead.pop()
        if isinstance(x, tuple) and x[0] == "rule" and x[1] not in used:
            used.add(x[1])
            ahead.append(RULES[x[1]])
        elif isinstance(x, tuple):
            ahead.extend(part for part in x[1:] if isinstance(part, tuple))
    assert used == set(RULES)
    text = policy_grammar()
    for word in [
        *(
            f"{parameter}.{field}"
            for parameter, (kind, _) in INPUTS.items()
            for field in kind._fields
        ),
        *(f"def {name}({', '.join(parameters)}):" for name, parameters in FUNCTIONS.items()),
        *(f" {sign} " for sign, *_ in OPERATORS.values()),
        *(f" {sign} " for sign in COMPARISONS.values()),
        *CALLS,
    ]:
        assert f'"{word}' in text, word
    assert set(MOST_LOCALS) == {len(parameters) for parameters in FUNCTIONS.values()}
