from pathlib import Path

from autopoiesis.arms.card import field_meanings, language_card
from autopoiesis.arms.features import FUNCTIONS, INPUTS
from autopoiesis.arms.language import CALLS, verify


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
