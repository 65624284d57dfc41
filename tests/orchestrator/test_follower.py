"""The supervisor makes replicas what their targets say; what does not come up becomes what it was."""

import asyncio
import sys
from contextlib import suppress

import pytest

from autopoiesis.orchestrator.child import Child
from autopoiesis.orchestrator.follower import Follower, action_for
from autopoiesis.orchestrator.local_replica import LocalReplica
from autopoiesis.replicas.fleet import Command, Member, free_ports, read_fleet, simulated_command
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.roster import Roster
from autopoiesis.replicas.targets import ChangeLog, Target, TargetFile, Want
from autopoiesis.replicas.vllm_process import last_line

TOO_MANY = 13
ON, OFF, ASLEEP = Target(Want.ON), Target(Want.OFF), Target(Want.ASLEEP)


def command(member: Member) -> Command:
    if member.max_num_seqs == TOO_MANY:
        return Command([sys.executable, "-c", "raise SystemExit('no room for 13')"], {})
    return simulated_command(member)


async def changed(log: ChangeLog, limit_s: float = 60.0):
    async with asyncio.timeout(limit_s):
        while not (new := log.new()):
            await asyncio.sleep(0.05)
    (change,) = new
    return change


async def test_a_replica_follows_its_target_and_gets_back_what_it_was(tmp_path):
    member = Member("r0", f"127.0.0.1:{free_ports(1)[0]}", "h100-llama-3-8b-tp1-bf16")
    child = Child("r0", [], tmp_path / "r0.log")
    replica = LocalReplica(member, child, command, explain=last_line)
    fleet, targets = tmp_path / "fleet.json", TargetFile(tmp_path / "targets.json")
    roster, log, said = Roster(fleet, [member]), ChangeLog(tmp_path / "changes.jsonl"), []
    await replica.start(member)
    follower = Follower(
        [replica], targets, ChangeLog(tmp_path / "changes.jsonl"), roster, said.append
    )
    following = asyncio.create_task(follower.run())
    try:
        targets.write({"r0": Target(Want.ON, Limits(TOO_MANY))})
        failed = await changed(log)
        assert (failed.action, failed.max_num_seqs) == ("restart", 0)
        assert "no room for 13" in failed.error
        assert child.pid is not None
        assert read_fleet(fleet) == (member,) or read_fleet(fleet)[0].serves

        targets.write({"r0": Target(Want.ON, Limits(8))})
        restarted = await changed(log)
        assert (restarted.action, restarted.error, restarted.max_num_seqs) == ("restart", "", 8)
        assert restarted.import_s > 0.0
        assert (read_fleet(fleet)[0].max_num_seqs, read_fleet(fleet)[0].serves) == (8, True)

        targets.write({"r0": Target(Want.ASLEEP, Limits(8))})  # it cannot: it is stopped
        stopped = await changed(log)
        assert (stopped.action, child.pid, read_fleet(fleet)[0].serves) == ("stop", None, False)

        targets.write({"r0": Target(Want.ON, Limits(8))})
        assert (await changed(log)).action == "start"
        assert child.pid is not None
        assert read_fleet(fleet)[0].serves
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await child.stop(5.0)


@pytest.mark.parametrize(
    ("present", "target", "again", "action"),
    [
        (ON, ON, False, None),
        (ON, ON, True, "restart"),
        (ON, Target(Want.ON, Limits(8)), False, "restart"),
        (ON, OFF, False, "stop"),
        (ON, ASLEEP, False, "sleep"),
        (ASLEEP, ON, False, "wake"),
        (ASLEEP, Target(Want.ON, Limits(8)), False, "restart"),
        (ASLEEP, OFF, False, "stop"),
        (OFF, ON, False, "start"),
        (OFF, ASLEEP, False, None),
        (OFF, OFF, True, None),
    ],
)
def test_what_leads_from_one_to_the_other(present, target, again, action):
    assert action_for(present, target, again) == action
