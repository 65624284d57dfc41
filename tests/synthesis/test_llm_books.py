"""Money is reserved before it is spent, by any number of processes; models are chosen by gain for money."""

import multiprocessing
import os
import signal

import orjson
import pytest

from autopoiesis.synthesis.llm.choice import ModelChoice
from autopoiesis.synthesis.llm.ledger import BudgetError, Ledger, Spent
from autopoiesis.synthesis.llm.settings import LlmSettings

DAY_S = 86_400.0
LIMITS = LlmSettings(
    budget_tokens=1000, budget_tokens_per_day=2500, budget_usd=1.0, budget_usd_per_day=2.0
)


def test_a_reservation_counts_until_it_is_settled(tmp_path):
    ledger = Ledger(tmp_path / "l.json", LIMITS)
    most = Spent(600, 0.5)
    name = ledger.reserve(most)
    with pytest.raises(BudgetError, match="budget_tokens allows 1000"):
        ledger.reserve(Spent(401, 0.1))
    ledger.settle(name, most, Spent(100, 0.1))
    assert ledger.cycle == Spent(100, pytest.approx(0.1))
    ledger.reserve(Spent(900, 0.9))
    with pytest.raises(BudgetError, match="this cycle"):
        ledger.reserve(Spent(1, 0.0))


def test_the_day_adds_up_over_cycles_and_ends(tmp_path):
    now_s = 10 * DAY_S
    for _ in range(2):
        Ledger(tmp_path / "l.json", LIMITS, lambda: now_s).reserve(Spent(1000, 0.1))
    with pytest.raises(BudgetError, match="budget_tokens_per_day allows 2500"):
        Ledger(tmp_path / "l.json", LIMITS, lambda: now_s + DAY_S - 1).reserve(Spent(1000, 0.1))
    Ledger(tmp_path / "l.json", LIMITS, lambda: now_s + DAY_S).reserve(Spent(1000, 0.1))


def _reserve_and_die(path):
    Ledger(path, LIMITS).reserve(Spent(1000, 1.0))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_reserved_stays_spent(tmp_path):
    path = tmp_path / "l.json"
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=_reserve_and_die, args=(path,))
        child.start()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
    with pytest.raises(BudgetError, match="budget_usd_per_day"):
        Ledger(path, LIMITS).reserve(Spent(10, 0.1))


def _reserve_many(path):
    limits = LlmSettings(budget_tokens=10**6, budget_tokens_per_day=100)
    ledger = Ledger(path, limits)
    for _ in range(40):
        try:
            most = Spent(3, 0.0)
            ledger.settle(ledger.reserve(most), most, Spent(1, 0.0))
        except BudgetError:
            return


def test_processes_do_not_overspend_together(tmp_path):
    path = tmp_path / "l.json"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_reserve_many, args=(path,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert 95 <= orjson.loads(path.read_bytes())["settled"]["tokens"] <= 100


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"day": 1}', b'{"day":"2026-01-01","settled":{},"reserved":[]}']
)
def test_damaged_books_spend_nothing(tmp_path, content):
    (tmp_path / "l.json").write_bytes(content)
    with pytest.raises(BudgetError, match="damaged"):
        Ledger(tmp_path / "l.json", LIMITS).reserve(Spent(1, 0.0))


def test_books_that_cannot_be_kept_spend_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BudgetError, match="cannot be kept"):
        Ledger(tmp_path / "file" / "l.json", LIMITS).reserve(Spent(1, 0.0))


# --- choosing models ---------------------------------------------------------------------------

MODELS = LlmSettings(models=("dear", "cheap"), prices={"dear": (10.0, 40.0), "cheap": (0.1, 0.4)})


def spend(choice: ModelChoice, rounds: int, gains: dict[str, float]) -> dict[str, int]:
    asked = dict.fromkeys(gains, 0)
    for _ in range(rounds):
        model = choice.choose()
        asked[model] += 1
        usd = MODELS.cost_usd(model, 6000, 1500)
        choice.answered(model, gains[model], 7500, usd)
    return asked


def test_every_model_is_tried_the_cheapest_first(tmp_path):
    choice = ModelChoice(tmp_path / "m.json", MODELS)
    assert choice.choose() == "cheap"
    choice.answered("cheap", 0.01, 7500, 0.001)
    assert choice.choose() == "dear"


def test_the_model_with_the_most_gain_for_its_price_is_asked_most(tmp_path):
    even = spend(ModelChoice(tmp_path / "a.json", MODELS), 60, {"dear": 0.02, "cheap": 0.02})
    assert even["cheap"] > 45
    better = spend(ModelChoice(tmp_path / "b.json", MODELS), 60, {"dear": 0.05, "cheap": 0.0})
    assert better["dear"] > 15
    assert better["cheap"] > 1


def test_without_all_prices_tokens_are_the_cost(tmp_path):
    unknown = LlmSettings(models=("long", "short"))
    choice = ModelChoice(tmp_path / "m.json", unknown)
    for _ in range(40):
        model = choice.choose()
        choice.answered(model, 0.01, 9000 if model == "long" else 1000, 0.0)
    assert choice.records["short"].answers > 3 * choice.records["long"].answers


def test_what_is_known_of_models_outlives_the_process(tmp_path):
    choice = ModelChoice(tmp_path / "m.json", MODELS)
    spend(choice, 5, {"dear": 0.05, "cheap": 0.0})
    choice.save()
    again = ModelChoice(tmp_path / "m.json", MODELS)
    assert again.records == choice.records
    for junk in (
        b"{",
        b"[]",
        b'{"cheap": {"answers": -5, "reward": 0, "cost": 0}}',
        b'{"cheap": 3}',
    ):
        (tmp_path / "m.json").write_bytes(junk)
        assert ModelChoice(tmp_path / "m.json", MODELS).choose() == "cheap"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"base_url": "ftp://x"}, "no address"),
        ({"base_url": "https://me:secret@host/v1"}, "use api_key_env"),
        ({"api_key_env": "sk-0123"}, "not the key itself"),
        ({"models": ("a",), "prices": {"b": (1.0, 1.0)}}, "not among the models"),
        ({"prices": {"b": (-1.0, 1.0)}}, "greater than or equal to 0"),
        ({"attempts": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        LlmSettings(**given)
