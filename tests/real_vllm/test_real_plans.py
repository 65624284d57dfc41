"""A slow policy changes two real vLLM replicas that serve: one goes, and two with other limits come."""

import pytest
from conftest import SIZES
from fleet_scene import ended, rows, told, under_load
from gateway_process import run, serving, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

POLICY = """
def should_reschedule(window, fleet, plan):
    return any(group.max_num_seqs > 8 for group in plan.groups)

def schedule(window, fleet, plan):
    group = plan.groups[0]
    replicas, seqs = (1, group.max_num_seqs) if group.replicas == 2 else (2, 8)
    place = (group.model, group.gpu, group.tensor_parallel)
    return Plan([ReplicaGroup(*place, replicas, seqs, group.max_num_batched_tokens, share=1.0)])

def score(request, replica, fleet):
    return replica.in_flight
"""


@pytest.fixture(scope="module")
def planned(vllm_python, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    (folder / "plans.toml").write_text('plan_control = "on"\nsynthesizer = "none"\n')
    (folder / "stepwise.py").write_text(POLICY)
    options = ["--config", "plans.toml", "--vllm", str(tiny_model), "--vllm-python", vllm_python]
    options += ["--replicas", "2", "--window", "10", "--", *SIZES]  # a plan may take 60 windows
    with serving(folder, *options, start_limit_s=400) as gateway:
        yield gateway


def test_plans_scale_in_and_out_with_other_limits_and_no_request_fails(planned):
    with under_load(planned, 3) as loads:
        for words in (
            ("arms", "add", "stepwise.py", "--canary"),
            ("control", "allocate", "stepwise"),
        ):
            code, _, errors = run(*words, cwd=planned.folder)
            assert 0 == code, errors
        applied = "select * from plans where outcome = 'applied' order by finished_s"
        ended_badly = "select * from plans where outcome in ('refused', 'failed', 'given up')"
        wait_until(lambda: len(rows(planned, applied)) == 2 or rows(planned, ended_badly), 900)
    whole, cut, refused = ended(loads)

    assert not rows(planned, ended_badly)
    assert whole > 0
    assert (0, []) == (cut, refused)
    assert [("ready", 8)] * 2 == [
        (r["standing"], r["max_num_seqs"]) for r in told(planned).values()
    ]
    for plan in rows(planned, applied):
        assert all(plan[cost] > 0.0 for cost in ("scheduling_s", "stale_s", "idle_replica_s"))
    actions = "select action from reconfigurations where error = '' and began_s > (select min(created_s) from plans)"
    wait_until(lambda: len(rows(planned, actions)) >= 4, 30)
    assert sorted(r["action"] for r in rows(planned, actions)) == ["start", "start", "stop", "stop"]
