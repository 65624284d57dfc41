"""`autopoiesis arms ...` on a fresh data directory, on a stopped instance and on a running one; kill -9 meanwhile."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from controller_process import controlled
from typer.testing import CliRunner

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.files import arm_from_source, verified
from autopoiesis.arms.language import verify
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import SLOW_SEEDS, seed_arms
from autopoiesis.cli import app
from autopoiesis.orchestrator.catalogue import add_seeds
from autopoiesis.orchestrator.lineage import lineage
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.telemetry.store import Store

POLICY = "# {0} times\ndef score(request, replica, fleet):\n    return replica.in_flight * {0}\n"


def arms(folder: Path, *arguments: object, code: int = 0, data: str = ".autopoiesis") -> str:
    """Run a command of the registry on a data directory in the folder; return what it printed."""
    words = ["arms", *map(str, arguments), "--data-dir", str(folder / data)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.stdout if code == 0 else done.stderr


def arms_json(folder: Path, *arguments: object, data: str = ".autopoiesis") -> Any:
    return json.loads(arms(folder, *arguments, "--json", "-", data=data))


def policy_file(folder: Path, number: float, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(POLICY.format(number))
    return path


# --- fresh and stopped -----------------------------------------------------------------------------


def test_before_the_first_start_the_seeds_are_all_the_arms_there_are(tmp_path: Path):
    rows = arms_json(tmp_path, "list")
    kinds = {row["name"]: row["kind"] for row in rows}
    assert kinds == {arm.name: "fast" for arm in seed_arms()} | dict.fromkeys(SLOW_SEEDS, "slow")
    assert all(row["state"] == "live" and row["origin"] == "human" for row in rows)
    table = arms(tmp_path, "list")
    assert all(name in table for name in kinds)
    assert arms_json(tmp_path, "show", "least-requests")["origin"] == "human"
    assert "nobody" in arms(tmp_path, "show", "nobody", code=2)
    assert not (tmp_path / ".autopoiesis").exists()


def test_a_policy_is_added_to_a_fresh_data_directory_and_promoted_step_by_step(tmp_path: Path):
    told = arms_json(tmp_path, "add", policy_file(tmp_path, 3), "--why", "a hunch")
    assert (told["new"], told["name"], told["origin"], told["state"]) == (
        True,
        "mine",
        "files",
        "candidate",
    )
    assert not arms_json(tmp_path, "add", policy_file(tmp_path, 3))["new"]
    assert [arms_json(tmp_path, "promote", "mine")["state"] for _ in range(2)] == ["canary", "live"]
    assert "live already" in arms(tmp_path, "promote", "mine", code=2)
    arms(tmp_path, "pin", "mine", "--why", "it stays")
    assert "pinned" in arms(tmp_path, "retire", "mine", code=2)
    arms(tmp_path, "unpin", "mine")
    arms(tmp_path, "retire", "mine", "--why", "no longer needed")
    shown = arms_json(tmp_path, "show", "mine")
    assert shown["thought"] == "3 times"
    history = [(step["state"], step["pinned"]) for step in shown["history"]]
    assert history == [("candidate", False), ("canary", False), ("live", False), ("live", True), ("live", False),
                       ("retired", False)]  # fmt: skip
    assert shown["history"][0]["reason"].endswith("a hunch")
    assert shown["reason"].startswith("retired by ")
    assert shown["reason"].endswith(": no longer needed")
    with Store.open(tmp_path / ".autopoiesis/telemetry.duckdb") as store:
        told_events = store.query(
            "select message from events where kind = 'operator' order by at_s"
        ).rows
    assert len(told_events) == 6


def test_a_canary_has_traffic_at_once(tmp_path: Path):
    assert (
        arms_json(tmp_path, "add", policy_file(tmp_path, 4), "--canary", "--name", "four")["state"]
        == "canary"
    )
    assert arms_json(tmp_path, "show", "four")["id"] == verify(POLICY.format(4)).id


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"import os\n", "line 1"),
        (b"", "score"),
        (b"\xff\xfe\x00", "line 1"),
        (b"x = " + b"-" * 9000, "8192 bytes"),
    ],
)
def test_what_does_not_verify_is_refused_as_the_verifier_does(
    tmp_path: Path, content: bytes, word: str
):
    (tmp_path / "bad.py").write_bytes(content)
    assert word in arms(tmp_path, "add", tmp_path / "bad.py", code=2)
    assert "nowhere.py" in arms(tmp_path, "add", tmp_path / "nowhere.py", code=2)
    assert not (tmp_path / ".autopoiesis").exists()


def test_the_last_live_arm_is_not_retired(tmp_path: Path):
    names = [arm.name for arm in seed_arms()]
    for name in names[1:]:
        arms(tmp_path, "retire", name)
    assert "last live arm" in arms(tmp_path, "retire", names[0], code=2)


def test_sources_and_scores_of_two_arms_are_compared(tmp_path: Path):
    arms(tmp_path, "add", policy_file(tmp_path, 3, "three.py"))
    arms(tmp_path, "add", policy_file(tmp_path, 4, "four.py"))
    compared = arms_json(tmp_path, "diff", "three", "four")
    assert (compared["a"]["name"], compared["b"]["state"]) == ("three", "candidate")
    changed = [line for line in compared["diff"].splitlines() if line[0] in "+-"][2:]
    assert changed == ["-    return replica.in_flight * 3.0", "+    return replica.in_flight * 4.0"]
    assert "return replica.in_flight * 4.0" in arms(tmp_path, "diff", "three", "four")
    assert "do not differ" in arms(tmp_path, "diff", "three", "three")


# --- slow functions --------------------------------------------------------------------------------

SLOW = (
    "def should_reschedule(window, fleet, plan):\n    return window.utilisation > 0.9\n\n"
    "def schedule(window, fleet, plan):\n    return plan\n"
)


@pytest.mark.parametrize(
    ("files", "added", "kind"),
    [
        ({"mine.py": SLOW + POLICY.format(3)}, "mine.py", "both"),
        ({"mine.py": POLICY.format(3), "mine.plan.py": SLOW}, "mine.py", "both"),
        ({"mine.policy": "# A plan.\n" + SLOW}, "mine.policy", "slow"),
        ({"mine.plan.py": SLOW}, "mine.plan.py", "slow"),
    ],
)
def test_slow_functions_are_added_shown_exported_and_imported(
    tmp_path: Path, files: dict[str, str], added: str, kind: str
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = arms_json(tmp_path, "add", tmp_path / added)
    assert (told["new"], told["name"], told["kind"]) == (True, "mine", kind)
    shown = arms_json(tmp_path, "show", "mine")
    assert "def should_reschedule(window, fleet, plan):" in shown["slow"]
    assert ("def score(" in shown["source"]) == (kind == "both")
    assert "def score(" not in shown["slow"]
    panel = arms(tmp_path, "show", "mine")
    assert "slow functions" in panel
    assert "should_reschedule" in panel
    arms(tmp_path, "export", tmp_path / "out")
    rows = {row["name"]: row for row in arms_json(tmp_path, "import", tmp_path / "out", data="b")}
    assert rows["mine"]["verdict"] == "added"
    assert rows["mine"]["id"] == told["id"]
    assert rows["never"]["verdict"] == "known"
    again = arms_json(tmp_path, "show", "mine", data="b")
    assert (again["source"], again["slow"]) == (shown["source"], shown["slow"])
    diff = arms_json(tmp_path, "diff", "mine", "never")["diff"]
    assert diff.startswith(f"--- mine ({told['id']})\n+++ never")


def test_slow_functions_that_do_not_verify_are_refused_with_their_line(tmp_path: Path):
    (tmp_path / "bad.py").write_text(POLICY.format(3) + "import os\n" + SLOW)
    assert "line 4: `os` cannot be imported" in arms(tmp_path, "add", tmp_path / "bad.py", code=2)
    (tmp_path / "bad.py").write_text(SLOW + "def score(request, replica, fleet):\n    return x\n")
    line = SLOW.count("\n") + 2
    assert f"line {line}: `x`" in arms(tmp_path, "add", tmp_path / "bad.py", code=2)


def test_an_arm_with_slow_functions_alone_has_no_traffic_but_a_life(tmp_path: Path):
    (tmp_path / "mine.py").write_text("# A plan.\n" + SLOW)
    assert arms_json(tmp_path, "add", tmp_path / "mine.py", "--canary")["state"] == "canary"
    assert arms_json(tmp_path, "promote", "mine")["state"] == "live"
    for arm in seed_arms()[1:]:
        arms(tmp_path, "retire", arm.id)
    assert "last live arm" in arms(tmp_path, "retire", seed_arms()[0].id, code=2)
    for name in ("mine", *SLOW_SEEDS):
        assert arms_json(tmp_path, "retire", name)["state"] == "retired"


def test_what_a_language_model_was_asked_and_answered_is_shown_with_its_arm(tmp_path: Path):
    (tmp_path / ".autopoiesis").mkdir()
    written = replace(bred(5), origin=Origin.OPENAI, prompt="Write a policy.", answer="Here: ...")
    with Store.open(tmp_path / ".autopoiesis/telemetry.duckdb") as store:
        Registry(store).add(written)
    shown = arms_json(tmp_path, "show", "bred-5")
    assert (shown["prompt"], shown["answer"]) == ("Write a policy.", "Here: ...")
    panel = arms(tmp_path, "show", "bred-5")
    assert "Write a policy." in panel
    assert "Here: ..." in panel
    assert arms_json(tmp_path, "show", "bred-5")["kind"] == "fast"


# --- lineage and races -----------------------------------------------------------------------------


def bred(number: int, *parents: str, state: State = State.CANARY) -> Arm:
    return arm_from_source(POLICY.format(number), name=f"bred-{number}", origin=Origin.GENETIC, state=state,
                           created_at=float(number), parents=parents, reason="gain")  # fmt: skip


def candidate(arm: Arm, gain: float, verdict: str = "promoted") -> CandidateRow:
    return CandidateRow(
        arm.id, arm.source, verdict, "holdout", "why not", gain, gain - 0.1, gain + 0.1, arm.parents
    )


def synthesis(*candidates: CandidateRow) -> SynthesisRow:
    return SynthesisRow(
        5.0, 7, "regret: much", "genetic", 1.0, 1.0, 0, 0.0, promoted=(), candidates=candidates
    )


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A seed, a proposal that was rejected, and three generations bred from them."""
    seed = seed_arms()[0]
    lost = bred(10, seed.id)
    first = bred(11, seed.id, lost.id)
    second = bred(12, first.id, "0123456789ab")
    third = bred(13, first.id, second.id)
    (tmp_path / ".autopoiesis").mkdir()
    with Store.open(tmp_path / ".autopoiesis/telemetry.duckdb") as store:
        registry = Registry(store)
        add_seeds(registry)
        for arm in (first, second, third):
            registry.add(arm)
        store.write_synthesis(synthesis(candidate(lost, -0.2, "rejected"), candidate(first, 0.1)))
        store.write_synthesis(synthesis(candidate(second, 0.2), candidate(third, 0.3)))
    return tmp_path


def names(relatives: list[dict], key: str) -> dict:
    return {r["name"]: "repeated" if r.get("repeated") else names(r[key], key) for r in relatives}


def test_lineage_tells_ancestors_and_descendants_each_once_with_their_gains(family: Path):
    seed = seed_arms()[0].name
    lost = bred(10, seed_arms()[0].id).id
    told = arms_json(family, "lineage", "bred-12")
    assert names(told["ancestors"], "ancestors") == {
        "bred-11": {seed: {}, lost: {seed: "repeated"}}, "0123456789ab": {},
    }  # fmt: skip
    assert names(told["descendants"], "descendants") == {"bred-13": {}}
    (first, unknown) = told["ancestors"]
    assert (first["gain"], first["state"], first["origin"]) == (0.1, "canary", "genetic")
    assert unknown["state"] == "unknown"
    rejected = first["ancestors"][1]
    assert (rejected["state"], rejected["gain"]) == ("rejected", -0.2)
    assert names(arms_json(family, "lineage", seed)["descendants"], "descendants") == {
        "bred-11": {"bred-12": {"bred-13": "repeated"}, "bred-13": {}}
    }
    shown = arms(family, "lineage", "bred-12")
    assert "gain +0.100" in shown
    assert "bred-13" in shown


def test_a_large_family_of_two_parents_each_is_told_in_no_time(tmp_path: Path):
    with Store.open(Path(":memory:")) as store:
        registry = Registry(store)
        ids: list[str] = []
        for number in range(60):
            ids.append(registry.add(bred(number, *ids[-2:])).id)
        told = lineage(store.query, ids[-1])
    assert json.dumps(told).count('"ancestors"') <= 61


def test_a_family_that_claims_to_be_its_own_ancestor_is_told(tmp_path: Path):
    with Store.open(Path(":memory:")) as store:
        registry = Registry(store)
        one, other = bred(1), bred(2, bred(1).id)
        registry.add(replace(one, parents=(other.id,)))
        registry.add(other)
        told = lineage(store.query, one.id)
    assert names(told["ancestors"], "ancestors") == {"bred-2": {"bred-1": "repeated"}}


def test_races_are_shown_with_the_arm(family: Path):
    (race,) = arms_json(family, "show", "bred-11")["races"]
    assert (race["synthesis"], race["trigger"], race["verdict"], race["gain"]) == (
        0,
        "regret: much",
        "promoted",
        0.1,
    )
    assert "regret: much" in arms(family, "show", "bred-11")


# --- folders ---------------------------------------------------------------------------------------


def test_a_registry_goes_through_a_folder_and_keeps_what_is_known(family: Path, tmp_path: Path):
    out = tmp_path / "out"
    arms(family, "export", out)
    index = {arm["name"]: arm for arm in json.loads((out / "index.json").read_text())["arms"]}
    assert len(index) == len(seed_arms()) + len(SLOW_SEEDS) + 3
    assert {arm["file"] for arm in index.values()} == {p.name for p in out.iterdir()} - {
        "index.json"
    }
    assert index["bred-11"]["races"][0]["gain"] == 0.1
    assert index["bred-11"]["history"][0]["state"] == "canary"
    rows = {row["name"]: row for row in arms_json(tmp_path, "import", out, data="other")}
    assert {row["verdict"] for name, row in rows.items() if name in index} == {"added", "known"}
    assert rows["bred-12"]["verdict"] == "added"
    assert rows["least-requests"]["verdict"] == "known"
    shown = arms_json(tmp_path, "show", "bred-12", data="other")
    assert shown["parents"] == index["bred-12"]["parents"]
    assert (shown["origin"], shown["state"]) == ("genetic", "candidate")
    assert "there it was canary: gain" in shown["reason"]
    again = arms_json(tmp_path, "import", out, data="other")
    assert {row["verdict"] for row in again} == {"known"}


def test_files_that_are_refused_do_not_keep_the_others_out(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    policy_file(folder, 5, "good.py")
    (folder / "evil.policy").write_text("import os\n")
    (folder / "damaged.py").write_text("# arm: {}\n" + POLICY.format(6))
    (folder / "notes.txt").write_text("not a policy")
    done = CliRunner().invoke(
        app, ["arms", "import", str(folder), "--json", "-", "--data-dir", str(tmp_path / "data")]
    )
    assert done.exit_code == 2
    rows = {row["file"]: (row["verdict"], row["why"]) for row in json.loads(done.stdout)}
    assert set(rows) == {"good.py", "evil.policy", "damaged.py"}
    assert rows["good.py"][0] == "added"
    assert rows["evil.policy"][0] == "refused"
    assert "line 1" in rows["evil.policy"][1]
    assert "damaged" in rows["damaged.py"][1]
    assert "2 of 3 files were refused" in done.stderr


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, command: str):
    (tmp_path / "file").write_text("")
    assert "file" in arms(tmp_path, command, tmp_path / "file", code=2)
    if command == "import":
        (tmp_path / "empty").mkdir()
        assert "no policy file" in arms(tmp_path, command, tmp_path / "empty", code=2)


# --- kill -9 ---------------------------------------------------------------------------------------

ADDER = r"""
import sys
from pathlib import Path
from autopoiesis.orchestrator.orders import ordering
from autopoiesis.orchestrator.registrar import NewArm, Said
from autopoiesis.orchestrator.settings import Settings
with ordering(Settings(data_dir=Path(sys.argv[1]))) as orders:
    number = int(sys.argv[2])
    while True:
        number += 1
        print(f"{number} tried\n", end="", flush=True)  # one write: a kill leaves a line or none
        orders.add_arm(NewArm(sys.argv[3].format(number), name=f"arm-{number}", canary=True), Said("test"))
        print(f"{number} kept\n", end="", flush=True)
"""


def whole(store: Store, kept: list[int]) -> None:
    """Check that every acknowledged arm is there, with each of its steps, and no arm is there in part."""
    there = {arm.name: arm for arm in store.load_arms()}
    assert {f"arm-{number}" for number in kept} <= set(there)
    rows = store.query(
        "select arm_id, list(state order by at_s, rowid) from arm_history group by all"
    ).rows
    steps: dict[str, list[str]] = dict(rows)
    for name, arm in there.items():
        assert verified(arm).id == arm.id
        assert steps[arm.id][-1] == arm.state
        assert arm.origin is Origin.HUMAN or steps[arm.id] in (
            ["candidate"],
            ["candidate", "canary"],
        )
        if name.startswith("arm-") and int(name[4:]) in kept:
            assert arm.state is State.CANARY


def test_kill_9_of_a_command_loses_nothing_and_leaves_nothing_half_written(tmp_path: Path):
    rng = random.Random(5)
    data, said = tmp_path / "data", tmp_path / "said"
    kept: list[int] = []
    for round_ in range(4):
        with said.open("w") as out:
            adder = subprocess.Popen(
                [sys.executable, "-c", ADDER, str(data), str(1000 * round_), POLICY], stdout=out
            )
        until = time.monotonic() + 60
        while said.read_text().count("kept") < 3:
            assert adder.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.05))
        adder.kill()
        adder.wait()
        lines = [line.split() for line in said.read_text().splitlines()]
        kept += [int(number) for number, what in lines if what == "kept"]
        with Store.open(data / "telemetry.duckdb") as store:
            whole(store, kept)
    assert len(kept) >= 12


def test_kill_9_of_a_running_instance_amid_arms_add_loses_nothing(tmp_path: Path):
    rng = random.Random(6)
    kept: list[int] = []
    with controlled(tmp_path, window_s=600.0) as running:
        for round_ in range(3):
            adder = subprocess.Popen(
                [sys.executable, "-c", ADDER, str(running.settings.data_dir), str(1000 * round_), POLICY],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert adder.stdout
            for line in adder.stdout:
                if line.endswith(f"{1000 * round_ + 3} kept\n"):
                    break
            time.sleep(rng.uniform(0.0, 0.05))
            running.kill()
            rest, errors = adder.communicate(timeout=60)
            assert "whether it did what was asked is not known" in errors
            lines = [line.split() for line in rest.splitlines()]
            kept += [1000 * round_ + i for i in (1, 2, 3)]
            kept += [int(line[0]) for line in lines if line[1:] == ["kept"]]
            running.start()
        names_there = {row[0] for row in running.rows("select name from arms")}
        assert {f"arm-{number}" for number in kept} <= names_there
        running.kill()
        with Store.open(running.settings.telemetry_file) as store:
            whole(store, kept)
        running.start()


def test_commands_change_a_running_instance_through_its_control_port(tmp_path: Path):
    with controlled(tmp_path, window_s=600.0) as running:
        assert arms_json(tmp_path, "add", policy_file(tmp_path, 8))["state"] == "candidate"
        assert arms_json(tmp_path, "promote", "mine")["state"] == "canary"
        (tmp_path / "both.py").write_text(SLOW + POLICY.format(9))
        assert arms_json(tmp_path, "add", tmp_path / "both.py", "--canary")["kind"] == "both"
        assert arms_json(tmp_path, "show", "both") == running.client.get("/arms/both").json()
        assert arms_json(tmp_path, "show", "both")["slow"] == SLOW.replace("\n\n", "\n")
        assert "import" in arms(tmp_path, "add", evil(tmp_path), code=2)
        assert "nobody" in arms(tmp_path, "pin", "nobody", code=2)
        assert running.client.get("/arms/mine").json()["state"] == "canary"
        assert arms_json(tmp_path, "show", "mine") == running.client.get("/arms/mine").json()
        arms(tmp_path, "export", tmp_path / "out")
        rows = arms_json(tmp_path, "import", tmp_path / "out")
        assert {row["verdict"] for row in rows} == {"known"}
        (running.settings.data_dir / "control-token").write_text(
            "another, so that nobody is let in"
        )
        assert arms_json(tmp_path, "show", "mine")["state"] == "canary"
        assert "Authorization" in arms(tmp_path, "promote", "mine", code=2)


def evil(folder: Path) -> Path:
    (folder / "evil.py").write_text("import os\n")
    return folder / "evil.py"
