"""Every attack is tried for real in a process that is shut off, unverified; and as text, on both languages."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from attacks import DENIED, ENDED, FIND_PIPES, Attack, body_of, source_of, source_of_all, table
from slow_scenes import fleet, window

from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.sandbox.isolation import Isolation
from autopoiesis.arms.sandbox.process import Bounds, SlowFault, probe
from autopoiesis.arms.sandbox.slow_arm import SlowArm, SlowRefused
from autopoiesis.arms.slow import SlowPolicy, verify_slow

ATTACKS = {**DENIED, **ENDED}
SHUT_OFF = probe()[0] == Isolation.FULL
needs_isolation = pytest.mark.skipif(not SHUT_OFF, reason="this kernel lacks Landlock or seccomp")
X86_ONLY = {"a call of another ABI", "a 32-bit call"}
HARMLESS_IN_THE_POLICY_LANGUAGE = {"a number", "power"}
BOUNDS = Bounds(memory_bytes=256 << 20)


def unverified(source, modules=()):
    return SlowPolicy(source, "0" * 12, modules)


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    file = tmp_path_factory.mktemp("parent") / "secret"
    file.write_text("s3cret")
    os.environ["ATTACK_SECRET"] = "s3cret"
    yield file
    assert file.read_text() == "s3cret"
    assert not list(Path("/tmp").glob("attack*"))
    del os.environ["ATTACK_SECRET"]


@pytest.fixture(scope="module")
def victim():
    """One process that all attacks that must be denied are tried in, one after the other."""
    with SlowArm(unverified(source_of_all(DENIED.values()), ("numpy",)), BOUNDS) as arm:
        yield arm


def arguments(secret, attack=0):
    """What the attack gets: the parent's process and file."""
    plan = Plan([ReplicaGroup("llama", str(secret))])
    return window()._replace(requests=os.getpid(), completed=attack), fleet(), plan


@needs_isolation
@pytest.mark.parametrize("name", DENIED)
def test_denied_and_goes_on(name, victim, secret):
    victim._fared.clear()
    victim.start()
    process = victim._process
    with pytest.raises(SlowFault) as caught:
        victim.schedule(*arguments(secret, list(DENIED).index(name)))
    fault = str(caught.value)
    assert re.search(DENIED[name].says, fault), fault
    assert "got through" not in fault
    assert "s3cret" not in fault
    assert victim.should_reschedule(*arguments(secret)).value is True
    assert victim._process is process


@needs_isolation
@pytest.mark.parametrize("name", ENDED)
def test_ended_and_replaced(name, secret):
    if name in X86_ONLY and os.uname().machine != "x86_64":
        pytest.skip("an attack of x86-64")
    attack = ENDED[name]
    bounds = replace(BOUNDS, planner_s=attack.deadline_s)
    with SlowArm(unverified(source_of(attack)), bounds) as arm:
        arm.start()
        process = arm._process
        with pytest.raises(SlowFault, match=attack.says):
            arm.schedule(*arguments(secret))
        assert process.ended
        assert not Path(f"/proc/{process._process.pid}").exists()
        assert arm.should_reschedule(*arguments(secret)).value is True
        assert arm._process is not process


@pytest.mark.parametrize("name", ATTACKS)
def test_as_text_it_stops_at_the_fence_or_is_known_to_pass(name):
    attack = ATTACKS[name]
    if attack.fence:
        assert verify_slow(source_of(attack))
    else:
        with pytest.raises(PolicyError, match="line "):
            verify_slow(source_of(attack))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_policy_language_refuses_it(name):
    source = "def score(request, replica, fleet):\n" + body_of(ATTACKS[name])
    if name in HARMLESS_IN_THE_POLICY_LANGUAGE:  # finite, and done at once
        assert verify(source)
    else:
        with pytest.raises(PolicyError):
            verify(source)


# --- what works inside, and does no harm ---------------------------------------------------------


def answer_of(body, secret, modules=()):
    with SlowArm(unverified(source_of(Attack(body, "")), modules)) as arm:
        return arm.schedule(*arguments(secret)).value


@needs_isolation
def test_it_inherits_no_environment_and_no_files(secret):
    body = FIND_PIPES + (
        "def kind(fd):\n"
        "    try:\n"
        "        mode = os.fstat(fd).st_mode\n"
        "    except OSError:\n"
        "        return ''\n"
        "    return 'pipe' if stat.S_ISFIFO(mode) else 'nowhere' if stat.S_ISCHR(mode) else 'file'\n"
        "kinds = ' '.join(filter(None, map(kind, range(1000))))\n"
        "return Plan([ReplicaGroup(kinds, ' '.join(sorted(os.environ)))])"
    )
    (group,) = answer_of(body, secret).groups
    assert group.model == "nowhere nowhere nowhere pipe pipe nowhere"
    assert set(group.gpu.split()) <= {
        "LC_CTYPE", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    }  # fmt: skip


@needs_isolation
def test_changing_its_arguments_changes_nothing_here(secret):
    given = arguments(secret)
    body = "object.__setattr__(plan.groups[0], 'replicas', 99)\nreturn plan"
    with SlowArm(unverified(source_of(Attack(body, "")))) as arm:
        assert arm.schedule(*given).value.groups[0].replicas == 99
    assert given == arguments(secret)


@needs_isolation
def test_state_that_it_keeps_is_lost_with_its_process(secret):
    source = (
        "def should_reschedule(window, fleet, plan):\n"
        "    import os\n    os._exit(0)\n"
        "def schedule(window, fleet, plan, seen=[0]):\n"
        "    seen[0] += 1\n    return Plan([ReplicaGroup('a', 'b', replicas=seen[0])])\n"
    )
    with SlowArm(unverified(source)) as arm:

        def count():
            return arm.schedule(*arguments(secret)).value.groups[0].replicas

        assert [count(), count()] == [1, 2]
        with pytest.raises(SlowFault):
            arm.should_reschedule(*arguments(secret))
        assert count() == 1


@needs_isolation
def test_answering_its_own_question_is_its_answer_and_a_second_one_ends_it(secret):
    body = FIND_PIPES + (
        "sequence = sys._getframe(1).f_locals['sequence']\n"
        'os.write(answers, b\'{"sequence": %d, "answer": {"groups": []}}\\n\' % sequence)\n'
        "for _ in range(10**6):\n    pass\n"
        "return plan"
    )
    with SlowArm(unverified(source_of(Attack(body, "")))) as arm:
        assert arm.schedule(*arguments(secret)).value == Plan()
        process = arm._process
        end = time.monotonic() + 10.0
        os.set_blocking(process._answers, True)  # wait for the second
        assert os.read(process._answers, 1) == b"{"
        os.set_blocking(process._answers, False)
        assert time.monotonic() < end
        with pytest.raises(SlowFault, match="without being asked") as caught:
            arm.schedule(*arguments(secret))
        assert process.ended
        assert caught.value.cpu_s > 0.005  # what it did between the calls is charged


@needs_isolation
def test_where_files_are_can_be_asked(secret):
    # Landlock does not hide that a path exists; nothing of its content is told.
    assert answer_of("import os\nos.stat('/etc/passwd')\nreturn Plan()", secret) == Plan()


@needs_isolation
def test_a_policy_that_attacks_while_it_is_loaded_is_refused_after_three_times(secret):
    arm = SlowArm(unverified("import os\nos.fork()\n"))
    for _ in range(3):
        with pytest.raises(SlowFault, match="PermissionError"):
            arm.schedule(*arguments(secret))
    with pytest.raises(SlowRefused, match="failed 3 times"):
        arm.schedule(*arguments(secret))
    arm = SlowArm(unverified("while True: pass\n"), Bounds(start_s=1.0))
    with pytest.raises(SlowFault, match="did not answer in time"):
        arm.start()


@needs_isolation
def test_endless_recursion_is_an_error_or_the_end(secret):
    # Python 3.11 lets C code recurse until its stack is gone, later ones count.
    body = (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(self, name):\n"
        "        return repr(getattr(self, name))\nA().x"
    )
    with SlowArm(unverified(source_of(Attack(body, "")))) as arm:
        with pytest.raises(SlowFault, match=r"ended by signal SIGSEGV|RecursionError"):
            arm.schedule(*arguments(secret))
        assert arm.should_reschedule(*arguments(secret)).value


@needs_isolation
def test_a_process_that_does_not_read_is_ended(secret):
    source = source_of(Attack(FIND_PIPES + "os.close(requests)\nreturn plan", ""))
    with SlowArm(unverified(source)) as arm:
        arm.schedule(*arguments(secret))
        with pytest.raises(SlowFault, match="Its process ended"):
            arm.schedule(*arguments(secret))


@needs_isolation
def test_a_dead_parent_leaves_nothing_behind(tmp_path):
    # The parent is killed while the policy loops; the kernel ends the policy some CPU time later.
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from slow_scenes import fleet, window\n"
        "from autopoiesis.arms.plan import Plan\n"
        "from autopoiesis.arms.slow import SlowPolicy\n"
        "from autopoiesis.arms.sandbox.slow_arm import Bounds, SlowArm\n"
        "arm = SlowArm(SlowPolicy(sys.argv[2], '0' * 12, ()), Bounds(planner_s=2.0))\n"
        "arm.start(); print(arm._process._process.pid, flush=True)\n"
        "arm.schedule(window(), fleet(), Plan())\n"
    )
    source = source_of(Attack("while True: pass", ""))
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent), source], stdout=subprocess.PIPE
    )
    policy = psutil.Process(int(parent.stdout.readline()))
    while policy.cpu_times().user < 0.1:
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    policy.wait(timeout=60)


def test_the_page_on_the_sandbox_shows_every_attack():
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    assert table() in page
    assert f"All {len(ATTACKS)} attacks" in page
