"""A report says what the telemetry holds, to the digit, and nothing in it can do harm."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from gateway_process import run
from scipy import stats

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.orchestrator.report import ReportError
from autopoiesis.orchestrator.report_command import write_report
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.telemetry.records import (
    ArmEstimate,
    CellRow,
    EventRow,
    SynthesisRow,
    WindowRow,
)
from autopoiesis.telemetry.store import Store

START_S = 1_790_000_000.0
WINDOWS = 80
HOSTILE = "</title></svg><script>alert('$\\frac{x}')</script><img src=//evil.test onerror=x>"
HUMAN, RIVAL, NEW = "aaaa", "bbbb", "cccc"


def arm(id: str, name: str, origin: Origin) -> Arm:  # noqa: A002
    return Arm(id, name, origin, State.LIVE, "source", START_S, reason=HOSTILE)


def estimates(window: int) -> dict[str, float]:
    """What each arm would have earned: the new one is 0.1 above the best human one, give or take."""
    noise = np.random.default_rng(window).normal(0, 0.02, 3)
    return {HUMAN: 0.7 + noise[0], RIVAL: 0.6 + noise[1], NEW: 0.8 + noise[2]}


def window_row(window: int) -> WindowRow:
    return WindowRow(
        window, START_S + 10 * window, START_S + 10 * (window + 1), {"slo_ttft_s": 1.0, "slo_tpot_s": 0.1},
        {}, 100, 97, 2, 1, 500.0, 0.2, None if window == 3 else 0.9, 0.02, 0.05, 9.0, 0.75, 0.01, 0.0, 0.03,
        "reward" if window == 40 else "", 0.5,
    )  # fmt: skip


def write_span(store: Store) -> None:
    for each in (
        arm(HUMAN, "least-requests", Origin.HUMAN),
        arm(RIVAL, "_$round_robin$", Origin.HUMAN),
        arm(NEW, HOSTILE, Origin.GENETIC),
    ):
        store.save_arm(each)
    cells = (
        Cell(NEW, ("r0",), tuple(range(48)), 0.75),
        Cell(HUMAN, ("r1",), tuple(range(48, 64)), 0.25),
    )
    store.write_allocation(Allocation(0, cells))
    for window in range(WINDOWS):
        store.write_window(
            window_row(window),
            [
                CellRow(window, i, cell.arm_id, cell.replicas, len(cell.shards), cell.propensity, requests,
                        requests, 0, 0, 0, 10, 10, 0.2, 0.9, 0.02, 9.0, 0.75, 10.0)
                for i, (cell, requests) in enumerate(zip(cells, (75, 25), strict=True))
            ],
            estimates=[
                ArmEstimate(arm_id, value, None, value, value, 0.1, 0.5)
                for arm_id, value in estimates(window).items()
            ],
            allocation=Allocation(window + 1, cells),
            events=[EventRow(START_S + 400, "drift", 40, HOSTILE, HOSTILE)] if window == 40 else [],
        )  # fmt: skip
    row = SynthesisRow(
        START_S, 5, HOSTILE, "genetic", 3.0, 4.5, 120, 0.25, promoted=(NEW,), conclusion=HOSTILE
    )
    store.write_synthesis(row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    (folder / ".autopoiesis").mkdir()
    with Store.open(folder / ".autopoiesis" / "telemetry.duckdb") as store:
        write_span(store)
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> tuple[dict, str, str]:
    """The numbers, the page, and what the command prints."""
    code, said, errors = run("report", "--out", "r.html", "--json", "r.json", cwd=folder)
    assert (0, "") == (code, errors)
    return json.loads((folder / "r.json").read_text()), (folder / "r.html").read_text(), said


def test_the_gain_over_the_best_human_arm_is_that_of_the_estimates(printed):
    best, second = printed[0]["gains"]
    gains = np.array([
        0.75 * e[NEW] + 0.25 * e[HUMAN] - e[HUMAN] for e in map(estimates, range(WINDOWS))
    ])  # fmt: skip
    blocks = gains.reshape(20, -1).mean(1)
    reach = stats.t.ppf(0.975, 19) * blocks.std(ddof=1) / np.sqrt(20)

    assert ("least-requests", WINDOWS) == (best["name"], best["windows"])
    assert best["gain"] == pytest.approx(gains.mean())
    assert [best["low"], best["high"]] == pytest.approx(
        [gains.mean() - reach, gains.mean() + reach]
    )
    assert "_$round_robin$" == second["name"]
    assert second["gain"] > best["gain"] > 0


def test_totals_shares_and_costs_are_those_of_the_rows(printed):
    numbers, _, said = printed
    shares = {row["id"]: row["share"] for row in numbers["arms"]}

    assert 100 * WINDOWS == numbers["totals"]["requests"]
    assert 0.75 == pytest.approx(numbers["totals"]["utility"])
    assert {NEW: 0.75, HUMAN: 0.25, RIVAL: 0.0} == shares
    assert [1.0] * WINDOWS == pytest.approx(np.sum(list(numbers["shares"].values()), axis=0))
    assert [40] == [row["window_id"] for row in numbers["drift"]]
    assert "clearly better" in said
    assert "4 s of CPU, 120 tokens and 0.25 USD" in said


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: set[str] = set()
        self.handlers: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}
        self.links |= {value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "style"}
                       and ("//" in (value or "") or name == "src")}  # fmt: skip

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_hostile_names_are_text(printed):
    page = printed[1]
    tags = Tags(page)

    assert set() == tags.names & {"script", "img", "link", "iframe", "object", "foreignobject", "a"}
    assert set() == tags.links | tags.handlers
    assert "default-src 'none'" in page
    assert HOSTILE in tags.text
    assert "_$round_robin$" in tags.text
    assert 4 == page.count("<svg ")


def test_a_span_is_chosen_by_its_ends_or_by_its_length(folder):
    settings, target = Settings(data_dir=folder / ".autopoiesis"), folder / "span.html"
    start = "2026-09-21T14:13:20"
    made = write_report(settings, start, "2026-09-21T14:14:20Z", None, target).report
    last = write_report(settings, None, None, 100.0, target).report

    assert (0, 5) == (made.first_window, made.last_window)
    assert (70, 79) == (last.first_window, last.last_window)
    assert all(gain.low < gain.gain < gain.high for gain in last.gains)


def test_too_few_windows_give_no_interval(folder):
    settings = Settings(data_dir=folder / ".autopoiesis")
    made = write_report(settings, None, None, 40.0, folder / "few.html")

    assert [None, None] == [gain.low for gain in made.report.gains]
    assert "too few windows for an interval" in made.text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--since", "2031-01-01"], "No window began between"),
        (["--since", "yesterday"], "'yesterday' is no time"),
        (["--since", "2026-09-21", "--for", "5"], "not both"),
        (["--out", "nowhere/r.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(folder, options, told):
    code, said, errors = run("report", *options, cwd=folder)

    assert (2, "") == (code, said)
    assert told in errors
    assert "Traceback" not in errors


def test_an_instance_without_windows_is_told_so(tmp_path):
    Store.open(tmp_path / "telemetry.duckdb").close()
    with pytest.raises(ReportError, match="no windows yet"):
        write_report(Settings(data_dir=tmp_path), None, None, None, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_clock_that_went_back_is_no_trouble(tmp_path):
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        for window in range(6):
            earlier_s = START_S - 3600 * (window > 2) + 10 * window
            store.write_window(
                replace(window_row(window), started_s=earlier_s, ended_s=earlier_s + 10)
            )
    made = write_report(Settings(data_dir=tmp_path), None, None, None, tmp_path / "r.html").report

    assert (0, 5) == (made.first_window, made.last_window)
