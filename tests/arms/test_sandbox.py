"""How slow policies run: what they answer, what that costs, how well they are shut off, and who refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import psutil
import pytest
from hypothesis import given
from slow_scenes import SEEDS, fleet, functions, gpu, option, window

from autopoiesis.arms.plan import Plan, ReplicaGroup
from autopoiesis.arms.sandbox import process as process_module
from autopoiesis.arms.sandbox.bpf import (
    ALLOW,
    ARCHITECTURES,
    COMPUTE_AND_ANSWER,
    DENIED,
    KILL,
    assemble,
)
from autopoiesis.arms.sandbox.isolation import Isolation
from autopoiesis.arms.sandbox.process import probe
from autopoiesis.arms.sandbox.slow_arm import Bounds, SandboxError, SlowArm, SlowFault, SlowRefused
from autopoiesis.arms.slow import verify_slow

LEVEL, LACKING = probe()
needs_isolation = pytest.mark.skipif(LEVEL != Isolation.FULL, reason=f"lacking here: {LACKING}")
TRIGGER = "def should_reschedule(window, fleet, plan):\n    return window.utilisation > 1.0\n"
PLANNER = "def schedule(window, fleet, plan):\n    return plan\n"
ONE = Plan([ReplicaGroup("llama", "H100", 1, 2)])


def policy(trigger=TRIGGER, planner=PLANNER):
    return verify_slow(trigger + planner)


# --- the filter of system calls ------------------------------------------------------------------


def verdict(program, architecture, number, *arguments):
    """Run the filter as the kernel does, on one call."""
    words = {0: number, 4: architecture}
    for i, value in enumerate((*arguments, *[0] * 6)[:6]):
        words[16 + 8 * i], words[20 + 8 * i] = value & 0xFFFFFFFF, value >> 32
    loaded, at = 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x20:
            loaded = words[operand]
        elif code == 0x06:
            return operand
        else:
            true = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: bool(loaded & operand)}[
                code
            ]
            at += if_true if true else if_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
class TestFilter:
    def program(self, machine):
        return assemble(ARCHITECTURES[machine], COMPUTE_AND_ANSWER, DENIED)

    def test_it_lets_through_exactly_what_it_names(self, machine):
        here, program = ARCHITECTURES[machine], self.program(machine)
        named = {rule.call for rule in COMPUTE_AND_ANSWER}
        allowed = {here.calls[call] for call in named if call in here.calls}
        for number in range(600):
            assert verdict(program, here.audit, number) == (ALLOW if number in allowed else DENIED)

    def test_files_are_opened_for_reading_only(self, machine):
        here, program = ARCHITECTURES[machine], self.program(machine)
        openat = here.calls["openat"]

        def opened(flags):
            return verdict(program, here.audit, openat, 3, 0x7F0000000000, flags)

        assert opened(os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == ALLOW
        for flag in (
            os.O_WRONLY,
            os.O_RDWR,
            os.O_CREAT,
            os.O_TRUNC,
            os.O_APPEND,
            os.O_TMPFILE & ~os.O_DIRECTORY,
        ):
            assert opened(flag | os.O_CLOEXEC) == DENIED
        if "open" in here.calls:
            assert verdict(program, here.audit, here.calls["open"], 0, os.O_RDWR) == DENIED
            assert verdict(program, here.audit, here.calls["open"], 0, os.O_RDONLY) == ALLOW

    def test_another_architecture_is_the_end(self, machine):
        here, program = ARCHITECTURES[machine], self.program(machine)
        assert verdict(program, 0x40000003, here.calls["read"]) == KILL
        if here.foreign_from is not None:
            assert verdict(program, here.audit, here.foreign_from | here.calls["read"]) == KILL

    @given(number=st.integers(0, 2**32 - 1))
    def test_no_number_leads_out_of_the_program(self, machine, number):
        here = ARCHITECTURES[machine]
        assert verdict(self.program(machine), here.audit, number) in {ALLOW, DENIED, KILL}


# --- what it answers -----------------------------------------------------------------------------


@needs_isolation
@pytest.mark.parametrize("name", SEEDS)
def test_seeds_answer_as_they_do_outside(name):
    trigger, planner = functions(name)
    there = fleet([gpu("H100", 8, 6), gpu("A100", 4)], [option(), option(on="A100", rps=1.0)])
    with SlowArm(SEEDS[name].policy) as arm:
        for rate in (1.0, 9.0, 300.0):
            now = window({"llama": rate}, utilisation=rate / 8)
            for plan in (Plan(), ONE):
                assert arm.should_reschedule(now, there, plan).value == trigger(now, there, plan)
                assert arm.schedule(now, there, plan).value == planner(now, there, plan)
        assert arm.faults == 0


@needs_isolation
def test_it_sees_what_it_is_told():
    source = (
        "def should_reschedule(window, fleet, plan):\n    return True\n"
        "def schedule(window, fleet, plan):\n"
        "    rates = ','.join(map(str, window.arrival_rates_rps))\n"
        "    first, node = fleet.gpus[0], fleet.nodes[0]\n"
        "    facts = f'{rates} {window.demand[1].model} {first.name} {node.available} {window.ttft_p99_s}'\n"
        "    facts = f'{facts} {fleet.lost}'\n"
        "    return Plan([ReplicaGroup(facts, plan.groups[0].gpu, share=fleet.options[0].start_s / 100)])\n"
    )
    there = fleet(nodes=[("a", "H100", 7)], lost=2)
    now = window({"a": 1.0, "b": 2.0}, ttft_p99_s=float("inf"))
    with SlowArm(verify_slow(source)) as arm:
        (group,) = arm.schedule(now, there, ONE).value.groups
        assert (group.model, group.gpu) == ("3.0,3.0,3.0,3.0,3.0 b H100 7 inf 2", "H100")
        assert group.share == pytest.approx(0.6)
        # What is the same as last time is not told again, what changed is.
        (group,) = arm.schedule(
            now, there._replace(lost=3), Plan([ReplicaGroup("m", "A100")])
        ).value.groups
        assert (group.model[-1], group.gpu) == ("3", "A100")
        (group,) = arm.schedule(now, there, ONE).value.groups
        assert (group.model[-1], group.gpu) == ("2", "H100")


@needs_isolation
def test_numpys_numbers_are_numbers():
    source = (
        "import numpy as np\n"
        "def should_reschedule(window, fleet, plan):\n    return np.float64(2.0) > 1.0\n"
        "def schedule(window, fleet, plan):\n"
        "    n = np.arange(4).sum()\n"
        "    return Plan([ReplicaGroup('llama', 'H100', np.int8(1), np.ceil(n / 2.0), share=np.float32(0.5))])\n"
    )
    with SlowArm(verify_slow(source)) as arm:
        assert arm.should_reschedule(window(), fleet(), ONE).value is True
        plan = Plan([ReplicaGroup("llama", "H100", 1, 3, share=0.5)])
        assert arm.schedule(window(), fleet(), ONE).value == plan


@needs_isolation
def test_what_scipy_does_with_libraries_loaded_late_works():
    source = (
        "import numpy as np\nfrom scipy import optimize, sparse, linalg, special\n"
        "def should_reschedule(window, fleet, plan):\n    return True\n"
        "def schedule(window, fleet, plan):\n"
        "    rng = np.random.default_rng(1)\n"
        "    square = lambda x: float((x ** 2).sum())\n"
        "    for method in ('trust-constr', 'SLSQP', 'Nelder-Mead', 'L-BFGS-B', 'COBYLA'):\n"
        "        optimize.minimize(square, np.ones(3), method=method, options={'maxiter': 20})\n"
        "    optimize.differential_evolution(square, [(-1, 1)] * 2, seed=1, maxiter=5)\n"
        "    optimize.linear_sum_assignment(rng.random((9, 9)))\n"
        "    optimize.linprog([1, 2], A_ub=[[-1, -1]], b_ub=[-1])\n"
        "    linalg.svd(rng.random((200, 200)))\n"
        "    sparse.linalg.spsolve(sparse.eye_array(9, format='csc'), np.ones(9))\n"
        "    return Plan([ReplicaGroup('llama', 'H100', share=float(special.expit(0.0)))])\n"
    )
    with SlowArm(verify_slow(source)) as arm:
        assert arm.schedule(window(), fleet(), ONE).value.groups[0].share == 0.5


@needs_isolation
def test_classes_prints_and_warnings_are_no_trouble():
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport warnings_\n"
        "@dataclass\nclass Cost:\n    money: float = 2.0\n"
        "def should_reschedule(window, fleet, plan):\n    print('x' * 100000)\n    return Cost().money > 1.0\n"
        + PLANNER
    ).replace("import warnings_\n", "")
    with SlowArm(verify_slow(source)) as arm:
        assert arm.should_reschedule(window(), fleet(), ONE).value is True


@needs_isolation
def test_a_fault_says_where_and_what_and_the_arm_goes_on():
    trigger = "def should_reschedule(window, fleet, plan):\n    return 1 / window.requests > 0\n"
    with SlowArm(policy(trigger)) as arm:
        with pytest.raises(
            SlowFault, match=r"^It failed: line 2: ZeroDivisionError: division by zero$"
        ):
            arm.should_reschedule(window(requests=0), fleet(), ONE)
        assert arm.should_reschedule(window(requests=5), fleet(), ONE).value
        assert arm.faults == 1


@needs_isolation
def test_it_is_refused_after_too_many_faults_and_forgiven_after_many_answers():
    trigger = "def should_reschedule(window, fleet, plan):\n    return 1 / window.requests > 0\n"

    def fails(arm):
        with pytest.raises(SlowFault):
            arm.should_reschedule(window(requests=0), fleet(), ONE)

    with SlowArm(policy(trigger)) as arm:
        fails(arm)
        fails(arm)
        for _ in range(100):
            arm.should_reschedule(window(requests=5), fleet(), ONE)
        for _ in range(3):
            fails(arm)
        with pytest.raises(SlowRefused, match="failed 3 times in its last 100 calls"):
            arm.should_reschedule(window(requests=5), fleet(), ONE)
        assert arm.isolation is None


# --- what that costs -----------------------------------------------------------------------------


@needs_isolation
def test_cpu_time_is_the_kernels_and_not_the_policys_word():
    busy = PLANNER.replace("return plan", "sum(i for i in range(window.requests))\n    return plan")
    with SlowArm(policy(planner=busy)) as arm:
        idle = arm.schedule(window(requests=0), fleet(), ONE)
        work = arm.schedule(window(requests=2_000_000), fleet(), ONE)
        assert 0.0 < idle.cpu_s < work.cpu_s <= work.wall_s + 0.01
        clock = psutil.Process(arm._process._process.pid).cpu_times()
        assert work.cpu_s <= clock.user + clock.system + 0.02


@needs_isolation
def test_a_fault_has_its_cost_too():
    loop = "def schedule(window, fleet, plan):\n    while True:\n        pass\n"
    with SlowArm(policy(planner=loop), Bounds(planner_s=0.3)) as arm:
        with pytest.raises(SlowFault) as caught:
            arm.schedule(window(), fleet(), ONE)
        assert caught.value.wall_s >= 0.3
        assert 0.0 < caught.value.cpu_s <= caught.value.wall_s


# --- how well it is shut off ---------------------------------------------------------------------


def test_the_probe_and_the_arms_agree():
    with SlowArm(policy(), allow_unsandboxed=True) as arm:
        assert arm.isolation is None
        assert arm.start() == arm.isolation == LEVEL
    assert arm.isolation is None
    assert [level.level for level in Isolation] == list(range(5))


BESIDE = """
import sys
sys.path.insert(0, sys.argv[1])
from slow_scenes import fleet, window
from autopoiesis.arms.plan import Plan
from autopoiesis.arms.sandbox import kernel
from autopoiesis.arms.sandbox.bpf import ALLOW, Rule, assemble, refuse
from autopoiesis.arms.sandbox.slow_arm import SandboxError, SlowArm, SlowFault
from autopoiesis.arms.slow import SlowPolicy

kernel.give_up_privileges()
rules = tuple(Rule(call, refuse(38)) for call in sys.argv[2].split())
kernel.install(assemble(kernel.architecture(), rules, ALLOW))
policy = SlowPolicy(
    "import os\\n"
    "def should_reschedule(window, fleet, plan):\\n    return os.listdir('/') != []\\n"
    "def schedule(window, fleet, plan):\\n    os.fork() or os._exit(0)\\n    return plan\\n",
    "0" * 12,
    (),
)
try:
    SlowArm(policy).start()
except SandboxError as error:
    print(error)
arm = SlowArm(policy, allow_unsandboxed=True)
print(arm.start())
for ask in (arm.should_reschedule, arm.schedule):
    try:
        print(ask(window(), fleet(), Plan()).value)
    except SlowFault as fault:
        print(fault)
arm.close()
"""


@needs_isolation
@pytest.mark.parametrize(
    ("lacks", "level", "reads_files", "forks"),
    [
        ("landlock_create_ruleset", "seccomp", True, False),
        ("seccomp", "landlock", False, os.getuid() == 0),  # a limit on processes does not bind root
        ("landlock_create_ruleset seccomp", "rlimits", True, os.getuid() == 0),
    ],
)
def test_a_kernel_that_lacks_something_is_refused_unless_allowed(lacks, level, reads_files, forks):
    # A filter around all of it makes this kernel answer as one without those system calls.
    run = subprocess.run(
        [sys.executable, "-c", BESIDE, str(Path(__file__).parent), lacks],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    refusal, reached, read, forked = run.stdout.splitlines()
    assert f"isolates a slow policy by {level} only, landlock+seccomp is needed" in refusal
    assert "Linux 5.13 or newer" in refusal
    assert "allow slow policies without a sandbox" in refusal
    assert reached == level
    assert (read == "True") == reads_files, read
    assert (forked == "Plan(groups=())") == forks, forked


def test_no_interpreter_and_no_library_are_told(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(SandboxError, match=r"could not be started: .*No such file"):
            SlowArm(policy()).start()
        patch.setattr(sys, "executable", "")
        with pytest.raises(SandboxError, match="no Python interpreter"):
            SlowArm(policy()).start()
    monkeypatch.setattr(process_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SandboxError, match="numpy is not installed; pip install numpy"):
        SlowArm(SEEDS["milp"].policy).start()


def test_an_interpreter_that_does_not_come_up_is_told_with_its_last_words(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(SandboxError, match=r"Its process ended with code 127\. no such library"):
        SlowArm(policy()).start()


@needs_isolation
def test_memory_is_bounded_and_can_be_used_up_to_the_bound():
    planner = PLANNER.replace("return plan", "bytes(window.requests << 20)\n    return plan")
    with SlowArm(policy(planner=planner), Bounds(memory_bytes=256 << 20)) as arm:
        assert arm.schedule(window(requests=200), fleet(), ONE).value == ONE
        with pytest.raises(SlowFault, match="MemoryError"):
            arm.schedule(window(requests=300), fleet(), ONE)


def test_features_may_hold_numpys_numbers():
    with SlowArm(policy(), allow_unsandboxed=True) as arm:
        now = window(utilisation=np.float64(1.5), requests=np.int64(3))
        now = now._replace(arrival_rates_rps=tuple(np.arange(3.0)))
        assert arm.should_reschedule(now, fleet(drain_s=np.float32(2.0)), ONE).value
        assert not arm.should_reschedule(window(utilisation=0.5), fleet(), ONE).value


@needs_isolation
def test_a_question_that_is_broken_off_leaves_no_answer_for_the_next():
    def stop(*_):
        raise KeyboardInterrupt

    slow = PLANNER.replace("return plan", "sum(range(10**8))\n    return plan")
    with SlowArm(policy(planner=slow)) as arm:
        arm.start()
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                arm.schedule(window(), fleet(), ONE)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert arm.should_reschedule(window(utilisation=2.0), fleet(), ONE).value
        assert arm.faults == 0


def test_nothing_stays_behind():
    before = set(Path("/proc/self/fd").iterdir())
    children = set(psutil.Process().children())
    for _ in range(3):
        with SlowArm(policy(), allow_unsandboxed=True) as arm:
            arm.start()
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert set(psutil.Process().children()) == children


def test_a_process_killed_from_outside_is_a_fault_and_is_replaced():
    with SlowArm(policy(), allow_unsandboxed=True) as arm:
        arm.start()
        victim = psutil.Process(arm._process._process.pid)
        victim.kill()
        while victim.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.005)
        with pytest.raises(SlowFault, match="ended by signal SIGKILL"):
            arm.should_reschedule(window(), fleet(), ONE)
        assert arm.should_reschedule(window(), fleet(), ONE)
