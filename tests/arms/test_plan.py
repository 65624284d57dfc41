"""Plans as JSON, what is wrong with them, and the way from one to another."""

import marshal
from collections import Counter

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import given, settings
from slow_scenes import fleet, gpu, option, window

from autopoiesis.arms.migration import Action, Order, Reload, differences, migration
from autopoiesis.arms.plan import (
    ROLES,
    Plan,
    PlanError,
    ReplicaGroup,
    plan_from_plain,
    plan_to_plain,
)
from autopoiesis.arms.plan_check import PlanLimits, check
from autopoiesis.arms.slow_features import (
    fleet_from_plain,
    to_plain,
    window_from_plain,
)

LLAMA = ReplicaGroup("llama", "H100", 1, 2)

groups = st.builds(
    ReplicaGroup,
    model=st.sampled_from(["llama", "qwen"]),
    gpu=st.sampled_from(["H100", "A100"]),
    tensor_parallel=st.sampled_from([1, 2, 4]),
    replicas=st.integers(1, 3),
    max_num_seqs=st.sampled_from([64, 256]),
    role=st.sampled_from(ROLES),
    share=st.floats(0, 1),
)
plans = st.builds(Plan, st.lists(groups, max_size=4))


def plain(**changed):
    return {"groups": [{"model": "llama", "gpu": "H100", **changed}]}


@given(plans)
def test_a_plan_survives_json(plan):
    assert plan_from_plain(orjson.loads(orjson.dumps(plan_to_plain(plan)))) == plan


def test_defaults_and_whole_floats():
    assert plan_from_plain(plain()) == Plan([ReplicaGroup("llama", "H100")])
    assert plan_from_plain(plain(replicas=3.0)).groups[0].replicas == 3


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "a plan must be an object with `groups`, got nothing"),
        ([], "a plan must be an object with `groups`, got a list"),
        ({}, "groups must be a list, got nothing"),
        ({"groups": "x"}, "groups must be a list, got 'x'"),
        ({"groups": [], "why": 1}, "a plan has no field 'why'; its fields: groups"),
        ({"groups": [{}] * 257}, "groups has 257 entries; at most 256 are possible"),
        ({"groups": [7]}, "groups[0] must be an object, got 7"),
        ({"groups": [{"gpu": "H100"}]}, "groups[0].model must be a name of 1 to 200 characters, got nothing"),
        (plain(gpu=""), "groups[0].gpu must be a name of 1 to 200 characters, got ''"),
        (plain(gpu="x" * 300), "groups[0].gpu must be a name"),
        (plain(tp=2), "groups[0] has no field 'tp'; its fields: model, gpu, tensor_parallel"),
        (plain(replicas=0), "groups[0].replicas must be a whole number from 1 to 65536, got 0"),
        (plain(replicas=-1), "groups[0].replicas must be a whole number"),
        (plain(replicas=2.5), "got 2.5"),
        (plain(replicas=True), "got True"),
        (plain(replicas=None), "got nothing"),
        (plain(replicas="2"), "got '2'"),
        (plain(replicas=10**300), "got a int"),
        (plain(replicas=float("inf")), "got inf"),
        (plain(tensor_parallel=4096), "groups[0].tensor_parallel must be a whole number from 1 to 1024"),
        (plain(max_num_seqs=[1]), "groups[0].max_num_seqs must be a whole number from 1 to 65536, got a list"),
        (plain(role="train"), "groups[0].role must be one of serve, prefill, decode, got 'train'"),
        (plain(role=[]), "groups[0].role must be one of"),
        (plain(share=1.5), "groups[0].share must be a number from 0 to 1, got 1.5"),
        (plain(share=float("nan")), "groups[0].share must be a number from 0 to 1, got nan"),
        (plain(share=True), "groups[0].share must be a number from 0 to 1, got True"),
        (plain(share=None), "groups[0].share must be a number from 0 to 1, got nothing"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused_with_a_sentence(value, says):
    with pytest.raises(PlanError) as caught:
        plan_from_plain(value)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
field_names = st.sampled_from(list(ReplicaGroup.__dataclass_fields__)) | st.text(max_size=4)
nearly = st.fixed_dictionaries(
    {"groups": st.lists(st.dictionaries(field_names, json_values, max_size=8) | json_values, max_size=3)}
)  # fmt: skip


@settings(max_examples=300)
@given(json_values | nearly)
def test_any_json_is_a_plan_or_refused(value):
    try:
        plan = plan_from_plain(value)
    except PlanError:
        return
    assert plan_from_plain(plan_to_plain(plan)) == plan


def test_features_survive_the_way_to_the_policy():
    now = window({"llama": 3.0, "qwen": 1.0})
    there = fleet([gpu(), gpu("A100")], nodes=[("a", "H100", 8)])
    assert window_from_plain(marshal.loads(marshal.dumps(to_plain(now)))) == now
    assert fleet_from_plain(marshal.loads(marshal.dumps(to_plain(there)))) == there


def test_capacity_and_migration_time():
    there = fleet(options=[option(rps=2.0), option(width=2, rps=5.0, start_s=90.0)])
    plan = Plan([LLAMA, ReplicaGroup("llama", "H100", 2, 1)])
    assert there.capacity_rps(plan, "llama") == 9.0
    assert there.capacity_rps(plan, "qwen") == 0.0
    assert there.migration_s(plan, plan) == 0.0
    assert there.migration_s(Plan(), plan) == 90.0
    assert there.migration_s(plan, Plan()) == 25.0
    assert there.migration_s(plan, Plan([LLAMA])) == 25.0
    assert there.migration_s(Plan([LLAMA]), Plan([ReplicaGroup("llama", "H100", 2, 1)])) == 115.0


# --- check -------------------------------------------------------------------------------------

GOOD = Plan([LLAMA])


def test_a_good_plan_has_no_faults():
    assert check(GOOD, fleet()) == []


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(), "llama has 0 replicas; it needs at least 1"),
        (Plan([ReplicaGroup("gpt", "H100")]), "groups[0].model 'gpt' is not served here; models: llama"),
        (Plan([ReplicaGroup("llama", "B200")]), "groups[0].gpu 'B200' is not in the fleet; types: H100"),
        (Plan([ReplicaGroup("llama", "H100", replicas=0)]), "groups[0].replicas is 0; it must be at least 1"),
        (
            Plan([ReplicaGroup("llama", "H100", max_num_seqs=0)]),
            "groups[0].max_num_seqs is 0; it must be at least 1",
        ),
        (
            Plan([ReplicaGroup("llama", "H100", max_num_seqs=9999)]),
            "groups[0].max_num_seqs is 9999; at most 4096 is allowed",
        ),
        (Plan([ReplicaGroup("llama", "H100", role="decode")]), "groups[0].role 'decode' is not offered here"),
        (
            Plan([ReplicaGroup("llama", "H100", 4)]),
            "groups[0]: llama does not run on 4 x H100; tensor_parallel there: 1",
        ),
        (Plan([ReplicaGroup("llama", "H100", replicas=9)]), "the plan uses 9 H100, of which 8 are available"),
        (Plan([LLAMA, LLAMA]), "the shares of llama's serve groups sum to 2; they must sum to 1"),
        (Plan([ReplicaGroup("llama", "H100", share=float("nan"))]), "groups[0].share is nan"),
    ],
)  # fmt: skip
def test_check_says_what_is_wrong(plan, says):
    assert any(says in fault for fault in check(plan, fleet())), check(plan, fleet())


def test_check_finds_replicas_without_a_node():
    there = fleet(
        [gpu(available=6)],
        [option(width=4), option(width=2)],
        nodes=[("a", "H100", 3), ("b", "H100", 3)],
    )
    assert check(Plan([ReplicaGroup("llama", "H100", 2, 2)]), there) == []
    assert check(Plan([ReplicaGroup("llama", "H100", 2, 3)]), there) == [
        "1 replicas of tensor_parallel 2 find no node with 2 free H100"
    ]
    assert check(Plan([ReplicaGroup("llama", "H100", 4, 1)]), there) == [
        "1 replicas of tensor_parallel 4 find no node with 4 free H100"
    ]


def test_check_of_prefill_and_decode():
    limits = PlanLimits(roles=ROLES)
    prefill = ReplicaGroup("llama", "H100", role="prefill")
    decode = ReplicaGroup("llama", "H100", role="decode")
    assert check(Plan([prefill, decode]), fleet(), limits) == []
    (fault,) = check(Plan([prefill]), fleet(), limits)
    assert "role serve, or both prefill and decode" in fault
    assert "needs at least 1" in check(Plan([decode]), fleet(), limits)[0]


def test_check_limits_changes():
    limits = PlanLimits(max_changes=2)
    assert check(Plan([ReplicaGroup("llama", "H100", 1, 4)]), fleet(), limits, GOOD) == []
    assert check(Plan([ReplicaGroup("llama", "H100", 1, 5)]), fleet(), limits, GOOD) == [
        "the plan starts or stops 3 replicas; at most 2 may change at once"
    ]


@given(plans)
def test_check_never_fails(plan):
    for fault in check(plan, fleet(), PlanLimits(max_changes=1), GOOD):
        assert fault
        assert "\n" not in fault


# --- differences and steps ---------------------------------------------------------------------


def test_differences():
    narrow, wide = ReplicaGroup("llama", "H100", 1, 3), ReplicaGroup("llama", "H100", 2, 1)
    other = ReplicaGroup("qwen", "H100", 1, 1)
    change = differences(Plan([narrow, wide]), Plan([ReplicaGroup("llama", "H100", 1, 1), other]))
    assert change.keep == Counter({narrow.kind: 1})
    assert change.reload == Counter({Reload(narrow.kind, other.kind): 1})
    assert change.stop == Counter({narrow.kind: 1, wide.kind: 1})
    assert change.start == Counter()
    assert change.total == 3
    assert change.shares


def test_same_plans_differ_in_nothing():
    change = differences(GOOD, GOOD)
    assert (change.total, change.shares) == (0, False)
    # How replicas are grouped does not matter, how traffic is split does.
    halves = Plan([ReplicaGroup("llama", "H100", 1, 1, share=0.5)] * 2)
    assert (differences(GOOD, halves).total, differences(GOOD, halves).shares) == (0, False)
    other = Plan([ReplicaGroup("llama", "H100", 1, 2, share=0.9)])
    assert (differences(GOOD, other).total, differences(GOOD, other).shares) == (0, True)


def test_minimal_order_starts_while_there_is_room_and_stops_last():
    old, new = (
        Plan([ReplicaGroup("llama", "H100", 1, 4)]),
        Plan([ReplicaGroup("llama", "H100", 2, 2)]),
    )
    narrow, wide = old.groups[0].kind, new.groups[0].kind
    steps = [(step.action, step.kind) for step in migration(old, new, {"H100": 6})]
    assert steps == [
        (Action.START, wide),
        (Action.STOP, narrow),
        (Action.STOP, narrow),
        (Action.START, wide),
        (Action.STOP, narrow),
        (Action.STOP, narrow),
    ]
    assert migration(old, old, {"H100": 6}) == migration(old, old, {"H100": 6}, Order.FULL) == ()


def test_full_order_stops_everything_first():
    old, new = (
        Plan([ReplicaGroup("llama", "H100", 1, 2)]),
        Plan([ReplicaGroup("llama", "H100", 1, 3)]),
    )
    actions = [step.action for step in migration(old, new, {"H100": 6}, Order.FULL)]
    assert actions == [Action.STOP] * 2 + [Action.START] * 3


def test_a_plan_that_does_not_fit_has_no_steps():
    with pytest.raises(ValueError, match="uses 2 H100, of which 1 are available"):
        migration(Plan(), GOOD, {"H100": 1})


@settings(max_examples=300)
@given(plans, plans, st.sampled_from(Order), st.integers(0, 4))
def test_steps_lead_from_one_plan_to_the_other_within_the_gpus(old, new, order, spare):
    available = Counter(new.gpus()) | Counter(old.gpus())
    for name in ("H100", "A100"):
        available[name] += spare
    running = old.kinds()
    used = Counter(old.gpus())
    stopped = 0
    for action, kind in migration(old, new, available, order):
        sign = 1 if action == Action.START else -1
        running[kind] += sign
        used[kind.gpu] += sign * kind.tensor_parallel
        stopped += action == Action.STOP
        assert running[kind] >= 0
        assert used[kind.gpu] <= available[kind.gpu]
    assert +running == new.kinds()
    change = differences(old, new)
    if order == Order.MINIMAL:
        assert stopped == change.stop.total() + change.reload.total()
    assert (
        change.keep + change.start + Counter(reload.new for reload in change.reload.elements())
        == new.kinds()
    )
