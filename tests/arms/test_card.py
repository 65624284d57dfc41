from dataclasses import fields
from pathlib import Path

from autopoiesis.arms import slow_features
from autopoiesis.arms.card import field_meanings, language_card, meanings_of
from autopoiesis.arms.features import FUNCTIONS, INPUTS
from autopoiesis.arms.language import CALLS, verify
from autopoiesis.arms.plan import ReplicaGroup
from autopoiesis.arms.seeds import slow_seeds
from autopoiesis.arms.slow import GIVEN, MODULES, verify_slow
from autopoiesis.arms.slow_card import slow_card


def test_the_reference_page_contains_the_card():
    page = Path(__file__).parents[2] / "docs" / "policy-language.md"
    assert language_card() in page.read_text("ascii")


def test_the_card_names_every_function_field_and_call():
    card = language_card()
    for parameter, (declared, _) in INPUTS.items():
        meanings = field_meanings(parameter)
        assert tuple(meanings) == declared._fields
        for field, meaning in meanings.items():
            assert meaning in card
            assert f"`{parameter}.{field}`" in card
    for name in [*FUNCTIONS, *CALLS]:
        assert f"`{name}" in card


def test_the_example_is_a_policy():
    example = language_card().split("```python\n")[1].split("```")[0]
    assert verify(example).functions >= {"score", "priority", "ceiling"}


def test_the_reference_page_contains_the_card_of_slow_functions():
    page = Path(__file__).parents[2] / "docs" / "policy-language.md"
    assert slow_card() in page.read_text("ascii")


def test_the_card_names_every_field_and_method_of_slow_functions():
    card = slow_card()
    for declared in vars(slow_features).values():
        if isinstance(declared, type) and hasattr(declared, "_fields"):
            meanings = meanings_of(declared)
            if declared.__module__ == slow_features.__name__:
                assert tuple(meanings) == declared._fields
            for field, meaning in meanings.items():
                assert f"{field}` | {meaning}" in card
    assert set(meanings_of(ReplicaGroup)) == {field.name for field in fields(ReplicaGroup)}
    for name in [*MODULES, *GIVEN, "fleet.option(model, gpu, tensor_parallel)", "plan.gpus()"]:
        assert f"`{name}" in card


def test_the_example_of_the_slow_card_is_a_slow_policy():
    example = slow_card().split("```python\n")[1].split("```")[0]
    assert verify_slow(example) in [seed.policy for seed in slow_seeds()]
