"""How vLLM is started with limits of its own, and what its log says of how long that took."""

import json

import pytest

from autopoiesis.replicas.devices import Berths, Gpu, Place, PlacementError, places
from autopoiesis.replicas.fleet import FleetError, Member
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.vllm_phases import Phases, phases
from autopoiesis.replicas.vllm_process import Vllm, knows_kv_events, last_line, too_old

GPUS = [Gpu(i, "H100", 80_000, 0) for i in range(4)]
LOG = """
(EngineCore) INFO 11-24 16:00:05 [default_loader.py:502] Loading weights took 2.10 seconds
(Worker_TP0) INFO [gpu_model_runner.py:5150] Model loading took 14.99 GiB memory and 3.500000 seconds
(Worker_TP1) INFO [gpu_model_runner.py:5150] Model loading took 14.99 GiB memory and 4.000000 seconds
(EngineCore) INFO [monitor.py:20] torch.compile took 12.30 s in total
(EngineCore) INFO [gpu_model_runner.py:6582] Graph capturing finished in 7 secs, took 0.60 GiB
(EngineCore) INFO [core.py:396] init engine (profile, create kv cache, warmup model) took 25.30 s (compilation: 12.30 s)
"""


def test_the_log_tells_what_the_parts_of_a_start_took():
    told = phases(LOG)
    assert told == Phases(4.0, 12.3, 7.0, pytest.approx(6.0))
    assert told.seconds == pytest.approx(29.3)
    assert phases("Loading weights took 2.10 seconds").load_s == 2.1
    assert phases("") == Phases(0.0, 0.0, 0.0, 0.0)


def test_a_replica_publishes_its_kv_events_where_it_is_told_and_nobody_else_told_it():
    member = Member("r", "127.0.0.1:8000", "p", kv_events="ipc:///run/r.kv")
    option, value = Vllm("m").command(member, Place("GPU 0", {}, (0,))).argv[-2:]
    assert "--kv-events-config" == option
    assert {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "ipc:///run/r.kv",
    } == json.loads(value)
    assert Vllm("m").may_publish
    assert not Vllm("m", ("--kv-events-config", "{}")).may_publish
    assert not Vllm("m", ("--data-parallel-size", "2")).may_publish
    assert not knows_kv_events("/nowhere/python")


def test_limits_are_those_of_the_arguments_until_a_restart_gives_others():
    vllm = Vllm("m", ("--max-num-seqs", "16", "--max-num-batched-tokens=2048"))
    assert vllm.limits == Limits(16, 2048)
    place = Place("GPU 0", {}, (0,))
    member = Member("r", "127.0.0.1:8000", "p", max_num_seqs=16)
    assert vllm.command(member, place).argv[-3:] == list(vllm.arguments)
    other = Member("r", "127.0.0.1:8000", "p", max_num_seqs=8, tensor_parallel=2)
    options = ["--max-num-seqs", "8", "--tensor-parallel-size", "2"]
    assert vllm.command(other, place).argv[-4:] == options
    with pytest.raises(FleetError, match="--max-num-seqs must be a whole number"):
        _ = Vllm("m", ("--max-num-seqs", "many")).limits


def test_sleep_needs_the_developers_routes():
    place = Place("GPU 0", {}, (0,))
    member = Member("r", "127.0.0.1:8000", "p")
    plain, sleepy = Vllm("m"), Vllm("m", ("--enable-sleep-mode", "--api-key", "secret"))
    assert (plain.can_sleep, sleepy.can_sleep, sleepy.api_key) == (False, True, "secret")
    assert "VLLM_SERVER_DEV_MODE" not in plain.command(member, place).environment
    assert sleepy.command(member, place).environment["VLLM_SERVER_DEV_MODE"] == "1"


def first(replicas, gpus_each):
    spots = places(replicas, gpus_each, GPUS, [0])
    return Berths({f"r{i}": spot for i, spot in enumerate(spots)}, GPUS)


def test_a_wider_replica_takes_gpus_that_nobody_has():
    berths = first(3, 1)
    assert berths.take("r0", 2).gpus == (0, 3)
    with pytest.raises(PlacementError, match="r1 would need 2 GPUs, and 1 are free"):
        berths.take("r1", 2)
    berths.leave("r2")
    assert berths.take("r1", 2).gpus == (1, 2)
    assert berths.take("r1", 1).gpus == (1,)
    assert berths.take("r2", 1).gpus == (2,)


def test_replicas_that_share_a_gpu_stay_on_it():
    spots = places(3, 1, GPUS[:1], [0])
    berths = Berths({f"r{i}": spot for i, spot in enumerate(spots)}, GPUS[:1])
    berths.leave("r1")
    assert berths.take("r1", 1).gpus == (0,)
    with pytest.raises(PlacementError, match="2 GPUs"):
        berths.take("r1", 2)


def test_on_cores_only_one_rank_is_possible():
    spots = places(2, 1, [], [0, 1])
    berths = Berths({f"r{i}": spot for i, spot in enumerate(spots)}, [])
    assert berths.take("r1", 1) == spots[1]
    with pytest.raises(PlacementError, match="needs GPUs"):
        berths.take("r1", 2)


def test_a_warning_is_no_cause_and_what_a_limit_must_be_is():
    log = (
        "WARNING Found ulimit of 1024. This could cause fd limit errors like `OSError: [Errno 24] Too many open "
        "files`. Consider increasing with ulimit -n\n"
        "pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
        "  Value error, max_num_batched_tokens (4) must be at least max_num_seqs (8). [type=value_error]\n"
    )
    cause = Vllm("m").why_it_failed(log)
    assert cause == "max_num_batched_tokens (4) must be at least max_num_seqs (8)."


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("0.6.3.post1", True),
        ("0.8.0", False),
        ("0.32.0+cpu", False),
        ("1.0", False),
        (None, False),
        ("dev", False),
    ],
)
def test_an_old_version_is_known(version, old):
    assert too_old(version) == old


def test_the_last_line_that_says_anything_explains_a_failure():
    assert last_line("one\ntwo\n\n") == "two"
    assert last_line("") == "it ended without saying why"
