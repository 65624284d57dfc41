"""The registry and arms as files."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from autopoiesis.arms.arm import SERVING, Origin, State
from autopoiesis.arms.files import arm_from_source, policy_files, read_arm, write_arm
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.parts import parts_of
from autopoiesis.arms.registry import MOVES, Registry, RegistryError
from autopoiesis.arms.seeds import seed_arms, slow_seed_arms
from autopoiesis.arms.slow import verify_slow


class DictStore:
    """An ArmStore that keeps arms in memory; it can be told to fail."""

    def __init__(self, arms=()):
        self.arms = {arm.id: arm for arm in arms}
        self.broken = False

    def load_arms(self):
        return list(self.arms.values())

    def save_arm(self, arm):
        if self.broken:
            raise OSError("disk full")
        self.arms[arm.id] = arm


def arm(number=1, name="mine", state=State.CANDIDATE, **facts):
    source = f"# Thought {number}.\ndef score(request, replica, fleet):\n    return {number}"
    facts = {"origin": Origin.FILES, "created_at": 5.0} | facts
    return arm_from_source(source, name=name, state=state, **facts)


def registry(*arms):
    store = DictStore(seed_arms())
    kept = Registry(store)
    for each in arms:
        kept.add(each)
    return kept


def test_arms_survive_in_the_store():
    kept = registry(arm(1), arm(2, parents=(arm(1).id,)))
    again = Registry(kept._store)
    assert again.all() == kept.all()
    assert again.get("mine-2").parents == (arm(1).id,)
    assert len(again.all()) == len(seed_arms()) + 2


def test_names_are_made_unique_and_policies_are_kept_once():
    kept = registry(arm(1), arm(2), arm(3))
    assert [a.name for a in kept.all()][-3:] == ["mine", "mine-2", "mine-3"]
    assert kept.add(replace(arm(2), name="other", state=State.LIVE)) == kept.get("mine-2")
    assert len(kept.all()) == len(seed_arms()) + 3


def test_add_checks_source_and_id():
    kept = registry()
    with pytest.raises(RegistryError, match="correct the id"):
        kept.add(replace(arm(1), id=arm(2).id))
    with pytest.raises(PolicyError, match="line 1"):
        kept.add(replace(arm(1), source="import os"))
    assert len(kept.all()) == len(seed_arms())
    loose = replace(arm(1), source="def score(request,replica,fleet):return 1")
    assert kept.add(loose).source == arm(1).source


def test_get_by_id_name_and_beginning():
    kept = registry(arm(1), arm(2))
    target = kept.get("mine-2")
    assert kept.get(target.id) is kept.get(target.id[:8]) is target
    with pytest.raises(RegistryError, match="there is no arm"):
        kept.get("nobody")
    with pytest.raises(RegistryError, match="there is no arm"):
        kept.get("")
    ids = [a.id for a in kept.all()]
    shared = next(i[0] for i in ids if sum(other[0] == i[0] for other in ids) > 1)
    with pytest.raises(RegistryError, match="more digits"):
        kept.get(shared)


def test_programs_are_compiled_once():
    kept = registry(arm(1))
    assert kept.program("mine") is kept.program(arm(1).id)
    assert kept.program("round-robin").entry[0] == 0


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("end", State)
def test_moves(start, end):
    kept = registry(arm(1, state=start))
    if end in MOVES[start]:
        moved = kept.move("mine", end, "because\n it  is so")
        assert (moved.state, moved.reason) == (end, "because it is so")
        assert Registry(kept._store).get("mine") == moved
    else:
        with pytest.raises(RegistryError, match=f"is {start} and cannot become {end}"):
            kept.move("mine", end, "because")
        assert kept.get("mine").state == start


def test_nothing_becomes_live_without_having_been_a_canary():
    assert [state for state in State if State.LIVE in MOVES[state]] == [State.CANARY]
    assert all(MOVES[state] for state in State)


def test_every_move_needs_a_reason():
    with pytest.raises(RegistryError, match="needs a reason"):
        registry(arm(1)).move("mine", State.SHADOW, "  ")


def test_pinned_arms_are_not_retired_but_quarantine_is_allowed():
    kept = registry(arm(1, state=State.CANARY))
    assert kept.pin("mine").pinned
    with pytest.raises(RegistryError, match="unpin"):
        kept.move("mine", State.RETIRED, "worse")
    assert kept.move("mine", State.QUARANTINED, "errors").pinned
    assert not kept.unpin("mine").pinned
    kept.move("mine", State.RETIRED, "worse")


def test_the_last_live_arm_stays():
    kept = Registry(DictStore([arm(1, state=State.LIVE), arm(2, "two", State.CANARY)]))
    with pytest.raises(RegistryError, match="last live arm"):
        kept.move("mine", State.QUARANTINED, "errors")
    kept.move("two", State.LIVE, "better")
    kept.move("mine", State.RETIRED, "worse")
    assert [a.name for a in kept.serving()] == ["two"]


def test_serving():
    kept = registry(*(arm(i, state=state) for i, state in enumerate(State)))
    assert {a.state for a in kept.serving()} == SERVING
    assert {a.id for a in kept.serving()} == {a.id for a in kept.all() if a.state in SERVING}


def test_arms_that_no_longer_verify_are_retired_and_kept():
    foreign = replace(arm(1, "old", State.LIVE), id="0123456789ab")
    broken = replace(arm(2, "broken", State.CANARY), source="def score(r): return open(r)")
    store = DictStore([foreign, broken, arm(3, state=State.LIVE)])
    kept = Registry(store)
    for name, why in [("old", "another id"), ("broken", "no longer verifies: line 1")]:
        assert kept.get(name).state == State.RETIRED
        assert why in kept.get(name).reason
        assert store.arms[kept.get(name).id] == kept.get(name)
        with pytest.raises(RegistryError, match="cannot serve"):
            kept.move(name, State.CANARY, "again")
    assert kept.get("broken").source == broken.source
    with pytest.raises(PolicyError):
        kept.program("broken")
    assert [a.name for a in kept.serving()] == ["mine"]


def test_a_failing_store_changes_nothing():
    kept = registry(arm(1))
    before = kept.all()
    kept._store.broken = True
    for change in (
        lambda: kept.add(arm(2)),
        lambda: kept.move("mine", State.SHADOW, "good"),
        lambda: kept.pin("mine"),
    ):
        with pytest.raises(OSError, match="disk full"):
            change()
    assert kept.all() == before


# --- files


def test_export_and_import_carry_everything_but_the_state(tmp_path):
    arms = [*seed_arms(), arm(1, "a/b \u00e9", parents=("x",), thought="Caf\u00e9\nline two")]
    paths = [write_arm(each, tmp_path) for each in arms]
    assert sorted(paths) == policy_files(tmp_path)
    found = {a.id: a for a in (read_arm(path, now_s=9.0) for path in paths)}
    for each in arms:
        back = found[each.id]
        facts = (each.name, each.origin, each.source, each.created_at, each.parents)
        assert (back.name, back.origin, back.source, back.created_at, back.parents) == facts
        assert back.state == State.CANDIDATE
    assert found[arms[0].id].thought == arms[0].thought
    assert found[arm(1).id].thought == "Caf\\xe9\nline two"


def test_a_plain_file_is_an_arm_named_after_it(tmp_path):
    path = tmp_path / "greedy.py"
    path.write_text('"""Why not."""\ndef score(request, replica, fleet):\n    return 1\n')
    found = read_arm(path, now_s=9.0)
    assert (found.name, found.origin, found.created_at) == ("greedy", Origin.FILES, 9.0)
    assert found.thought == "Why not."
    assert found.state == State.CANDIDATE


def test_an_exported_file_that_was_changed_says_so(tmp_path):
    path = write_arm(arm(1), tmp_path)
    text = path.read_text()
    path.write_text(text.replace("return 1.0", "return 2.0"))
    with pytest.raises(PolicyError, match="was changed after export; remove its first line"):
        read_arm(path, 9.0)
    for header in ("# arm: {", "# arm: []", "# arm: {}", '# arm: {"name": 1, "origin": "alien"}'):
        path.write_text(header + "\n" + arm(1).source)
        with pytest.raises(PolicyError, match=r"header of .* is damaged"):
            read_arm(path, 9.0)
    path.write_bytes(b"\xff" * 20000)
    with pytest.raises(PolicyError, match="over 8192 bytes"):
        read_arm(path, 9.0)


SLOW = (
    "def should_reschedule(window, fleet, plan):\n    return False\n"
    "def schedule(window, fleet, plan):\n    return plan\n"
)


def test_an_arm_with_a_slow_policy_has_an_id_of_its_own():
    plain, both = arm(1), arm(1, slow=SLOW)
    kept = registry(plain, both)
    assert plain.id != both.id
    assert kept.get(both.id).slow == SLOW
    assert kept.program(both.id).code.tolist() == kept.program(plain.id).code.tolist()
    with pytest.raises(RegistryError, match="correct the id"):
        kept.add(replace(both, slow=SLOW.replace("False", "True")))
    with pytest.raises(PolicyError, match="slow functions: line 1: `os` cannot be imported"):
        kept.add(replace(both, slow="import os\n" + SLOW))


def test_an_arm_may_have_slow_functions_alone():
    slow = arm_from_source(
        SLOW, name="plans", origin=Origin.FILES, state=State.LIVE, created_at=5.0
    )
    assert (slow.id, slow.source, slow.slow, slow.kind) == (verify_slow(SLOW).id, "", SLOW, "slow")
    assert [arm(1).kind, arm(1, slow=SLOW).kind] == ["fast", "both"]
    kept = Registry(DictStore([arm(1, state=State.LIVE), slow]))
    assert [a.name for a in kept.serving()] == [a.name for a in kept.fast()] == ["mine"]
    assert [a.name for a in kept.planning()] == ["plans"]
    with pytest.raises(RegistryError, match="only slow functions"):
        kept.program("plans")
    with pytest.raises(RegistryError, match="last live arm"):
        kept.move("mine", State.RETIRED, "worse")
    assert kept.move("plans", State.RETIRED, "worse").state == State.RETIRED


MIXED = """# A thought.
import math

def score(request, replica, fleet):
    return 1

LIMIT = 0.5
def schedule(window, fleet, plan):
    return plan
def admit(request, fleet): return 1
def ceiling(gpus):  # a function of its own
    return math.ceil(gpus)
def should_reschedule(window, fleet, plan):
    return LIMIT
"""


def test_fast_and_slow_functions_may_stand_in_one_text():
    fast, slow = parts_of(MIXED)
    assert verify(fast).functions == {"score", "admit"}
    assert verify_slow(slow).source == (
        "import math\nLIMIT = 0.5\ndef schedule(window, fleet, plan):\n    return plan\n"
        "def ceiling(gpus):\n    return math.ceil(gpus)\n"
        "def should_reschedule(window, fleet, plan):\n    return LIMIT\n"
    )
    both = arm_from_source(MIXED, name="", origin=Origin.FILES, state=State.LIVE, created_at=5.0)
    assert (both.kind, both.thought, both.name) == ("both", "A thought.", both.id)
    assert both == replace(both, source=verify(fast).source, slow=verify_slow(slow).source)
    assert parts_of(arm(1).source) == (arm(1).source, "")
    assert parts_of(MIXED.encode()) == parts_of(MIXED.replace("\n", "\r\n")) == (fast, slow)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (MIXED.replace("return 1\n\n", "return 1 +\n\n"), "line 5: not valid Python"),
        (MIXED.replace("return math.ceil", "return os.ceil(gpus.__class__) + "), "slow functions: line 12: "),
        (MIXED.replace("): return 1", "): return x"), "line 10: `x`"),
        (MIXED.replace("def score", "@print\ndef score"), "line 4: `@`"),
        (MIXED + "def score(request, replica, fleet):\n    return 2\n", "line 15: `score` is defined twice"),
        (MIXED.replace("def schedule(", "def plan_it("), "slow functions: line 1: `schedule` is missing"),
        (MIXED + "(" * 5000, "not valid Python|nested too deeply"),
        (MIXED + "\u00e9", "line 15: character"),
        (MIXED + "# " + "x" * 40_000, "over 32768 bytes"),
    ],
)  # fmt: skip
def test_a_mixed_text_is_refused_with_the_line_where_it_is_wrong(text, why):
    with pytest.raises(PolicyError, match=why):
        arm_from_source(text, name="", origin=Origin.FILES, state=State.LIVE, created_at=5.0)


@given(st.text(max_size=300) | st.text(alphabet="def schedule(,):\n\t #'\"\\@;x=1", max_size=300))
def test_any_text_is_split_or_refused(text):
    for source in (text, "def schedule(window, fleet, plan):\n    return plan\n" + text):
        try:
            fast, slow = parts_of(source)
        except PolicyError:
            continue
        assert not slow or len(slow.split("\n")) == len(
            source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        )
        assert slow or fast == source


def test_slow_functions_alone_are_one_file(tmp_path):
    slow = replace(slow_seed_arms()[0], parents=("x",))
    path = write_arm(slow, tmp_path)
    assert path.name == f"{slow.name}-{slow.id}.plan.py"
    assert policy_files(tmp_path) == [path]
    found = read_arm(path, 9.0)
    assert found == replace(slow, state=State.CANDIDATE, reason=found.reason)
    (tmp_path / "mine.plan.py").write_text(SLOW)
    assert read_arm(tmp_path / "mine.plan.py", 9.0).name == "mine"


def test_a_slow_policy_that_no_longer_verifies_retires_its_arm():
    both = replace(arm(1, slow=SLOW), slow="import os\n" + SLOW)
    loaded = Registry(DictStore([both, arm(2)]))
    assert loaded.get(both.id).state == State.RETIRED
    assert "no longer verifies: slow functions: line 1" in loaded.get(both.id).reason


def test_a_slow_policy_stands_in_a_file_beside_its_arm(tmp_path):
    both = arm(1, slow="# why\n" + SLOW)
    path = write_arm(both, tmp_path)
    write_arm(arm(2), tmp_path)
    beside = path.with_suffix(".plan.py")
    assert beside.read_text() == SLOW
    assert len(policy_files(tmp_path)) == 2
    found = read_arm(path, 9.0)
    assert (found.id, found.slow) == (both.id, SLOW)
    beside.write_text(SLOW.replace("False", "True"))
    with pytest.raises(PolicyError, match="was changed after export"):
        read_arm(path, 9.0)
    beside.write_bytes(b"\xff" * 100)
    with pytest.raises(
        PolicyError, match=r"slow functions: line 1: character .* is not plain ASCII"
    ):
        read_arm(path, 9.0)
