"""A whole cycle over real processes: worker, clerk, endpoint; and the same cycle again from its record."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import orjson
import psutil
import pytest
from scripted_endpoint import BROKEN, GOOD, PROSE, ScriptedEndpoint, fenced, hangs, refuses, says
from synthesis_scenes import uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.language import verify
from autopoiesis.synthesis.brief import BriefError
from autopoiesis.synthesis.launch import run_worker_now
from autopoiesis.synthesis.llm.clerk import Errand
from autopoiesis.synthesis.llm.exchange import read_recording
from autopoiesis.synthesis.llm.settings import LlmSettings
from autopoiesis.telemetry.records import SynthesisRow

KEY = "sk-test-0123456789abcdef"
WORSE = "# Slow ones first.\ndef score(request, replica, fleet):\n    return replica.speed\n"


def cycle(folder: Path, url: str, budget_s: float = 60.0, **settings) -> SynthesisRow:
    given = {
        "base_url": url,
        "models": ("small",),
        "api_key_env": "TEST_LLM_KEY",
        "timeout_s": 20.0,
    }
    chosen = LlmSettings(**{**given, **settings}).model_dump(mode="json")
    brief = replace(uneven_brief(), synthesizer=Origin.OPENAI, budget_s=budget_s)
    return run_worker_now(brief, errand=Errand(chosen, str(folder)))


def recording_in(folder: Path) -> Path:
    (path,) = (folder / "exchanges").glob("*.jsonl")
    return path


def clerks() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if "autopoiesis.synthesis.llm.clerk" in p.cmdline()]


def test_a_model_writes_the_next_policy_and_the_record_repeats_it_exactly(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    script = (
        refuses(429, "slow down", Retry_After="0.1"),
        says(fenced(WORSE, BROKEN)),
        says(fenced(GOOD)),
        says(PROSE),
    )
    with ScriptedEndpoint(*script) as endpoint:
        row = cycle(tmp_path, endpoint.url)
        assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert row.error == ""
    assert row.promoted == (verify(GOOD).id,)
    assert {c.gate for c in row.candidates} == {"screen", "promoted"}
    assert "repaired" in row.candidates[0].thought
    assert row.tokens == 1200 * 5  # 2 policies, 1 repair, then prose until patience ends
    assert clerks() == []

    path = recording_in(tmp_path)
    recording = read_recording(path)
    assert len(recording.exchanges) == 5
    assert recording.end["row"]["promoted"] == [verify(GOOD).id]
    assert orjson.loads((tmp_path / "ledger.json").read_bytes())["settled"]["tokens"] == row.tokens
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in written

    again = run_worker_now(recording.brief, recording=path)
    assert (again.candidates, again.promoted, again.tokens, again.cost_usd) == (
        row.candidates,
        row.promoted,
        row.tokens,
        row.cost_usd,
    )


def test_a_cycle_that_ran_out_of_time_is_repeated_up_to_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    with ScriptedEndpoint(says(fenced(WORSE, GOOD)), hangs(60.0)) as endpoint:
        row = cycle(tmp_path, endpoint.url, budget_s=5.0, timeout_s=60.0)
    assert row.seconds < 15.0
    recording = read_recording(recording_in(tmp_path))
    assert recording.exchanges[-1][1].fault in {"time", "late"}
    again = run_worker_now(recording.brief, recording=recording_in(tmp_path))
    assert (again.candidates, again.promoted) == (row.candidates, row.promoted)


def test_a_killed_clerk_ends_the_questions_not_the_cycle(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_LLM_KEY", KEY)
    with ScriptedEndpoint(hangs(60.0)) as endpoint:
        script = (
            "import sys; from pathlib import Path; here = Path(sys.argv[1]); sys.path[:0] = map(str, (here, "
            "here.parent)); import test_llm_cycle as t; "
            "row = t.cycle(Path(sys.argv[2]), sys.argv[3]); print(row.conclusion)"
        )
        arguments = [
            sys.executable,
            "-c",
            script,
            str(Path(__file__).parent),
            str(tmp_path),
            endpoint.url,
        ]
        parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 60.0
            while not endpoint.open:
                assert time.monotonic() < end
                time.sleep(0.05)
            (clerk,) = (
                p
                for p in psutil.Process(parent.pid).children(recursive=True)
                if "autopoiesis.synthesis.llm.clerk" in p.cmdline()
            )
            assert clerk.nice() == 19
            assert KEY not in " ".join(clerk.cmdline())
            worker = next(p for p in psutil.Process(parent.pid).children() if p.pid != clerk.pid)
            assert (clerk.environ()["TEST_LLM_KEY"], "TEST_LLM_KEY" in worker.environ()) == (
                KEY,
                False,
            )
            clerk.send_signal(signal.SIGKILL)
            out, _ = parent.communicate(timeout=60.0)
        finally:
            parent.kill()
            parent.wait()
    assert "Nothing promoted" in out
    assert "the process that speaks to them has ended" in out


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
def test_the_confined_reach_only_the_ports_they_need():
    code = (
        "import socket, sys; from autopoiesis.synthesis.confine import confine_network; "
        "ports = [int(p) for p in sys.argv[1:]]; print(confine_network(ports[:1]))\n"
        "for port in ports:\n"
        "    try: socket.create_connection(('127.0.0.1', port)); print('open')\n"
        "    except PermissionError: print('shut')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [str(s.getsockname()[1]) for s in (a, b)]
        out = subprocess.run(
            [sys.executable, "-c", code, *ports], capture_output=True, text=True, check=True
        ).stdout.split()
    if out[0] == "False":
        pytest.skip("this kernel has no Landlock with network rules")
    assert out == ["True", "open", "shut"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"kind": "cycle", "version": 9}',
        b'{"kind":"cycle","version":1,"brief":"AA=="}',
    ],
)
def test_a_file_that_is_no_recording_is_one_sentence(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(BriefError, match="holds no recorded exchanges") as caught:
        read_recording(tmp_path / "x.jsonl")
    assert "\n" not in str(caught.value)
    with pytest.raises(BriefError, match="Cannot read"):
        read_recording(tmp_path / "nowhere.jsonl")


def test_old_exchanges_make_room_for_new_ones(tmp_path):
    from autopoiesis.synthesis.llm.exchange import Recorder
    from autopoiesis.synthesis.llm.ledger import BudgetError

    for i in range(5):
        recorder = Recorder(tmp_path, f"2026-{i}", 3000)
        recorder.begin(os.urandom(600), "openai")
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 3000
    assert not (tmp_path / "2026-0.jsonl").exists()
    recorder.check_room()
    recorder.add({"kind": "exchange", "text": "x" * 4000})
    assert [p.name for p in tmp_path.iterdir()] == ["2026-4.jsonl"]
    with pytest.raises(BudgetError, match="exchanges_mib"):
        recorder.check_room()
