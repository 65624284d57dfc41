"""Whether the fleet has time to spare for writing policies, and which replica has most of it."""

from collections.abc import Mapping, Sequence

from autopoiesis.replicas.fleet import Member
from autopoiesis.synthesis.llm.fleet import Spare
from autopoiesis.telemetry.records import OpenRequest, ReplicaSample
from autopoiesis.twin.latency import profile

OLDEST_S = 5.0
"""A replica that has not reported for this long is not known to be idle."""


def spare(
    members: Sequence[Member],
    samples: Mapping[str, ReplicaSample],
    open_requests: Sequence[OpenRequest],
    now_s: float,
    below: float,
) -> Spare:
    """Tell whether nothing is held or waits and every replica is used less than `below` [0..1].

    A replica's use is the larger of its share of KV cache and of places in its batch. `samples` are
    the newest by replica name. Simulated replicas write nothing.
    """
    writers = [m for m in members if m.kind != "simulated" and m.name in samples]
    writers = [m for m in writers if samples[m.name].healthy]
    if not writers:
        simulated = all(m.kind == "simulated" for m in members)
        why = "its replicas are simulated and write nothing" if simulated else "no replica answers"
        return Spare(False, why)
    held = sum(not request.replica for request in open_requests)
    if held:
        return Spare(False, f"{held} requests are held")
    for member in members:
        sample = samples.get(member.name)
        if sample is None or now_s - sample.at_s > OLDEST_S:
            return Spare(False, f"{member.name} has not reported for {OLDEST_S:g} s")
        if sample.waiting > 0:
            return Spare(False, f"{sample.waiting:.0f} requests wait at {member.name}")
    use = {m.name: _use(m, samples[m.name]) for m in members if samples[m.name].healthy}
    busiest = max(use, key=lambda name: use[name])
    if use[busiest] >= below:
        return Spare(False, f"{busiest} is used to {use[busiest]:.0%}, not below {below:.0%}")
    idlest = min(writers, key=lambda member: use[member.name])
    return Spare(True, f"no replica is used more than {use[busiest]:.0%}", idlest.name)


def _use(member: Member, sample: ReplicaSample) -> float:
    places = max(float(sample.in_flight), sample.running) / profile(member.profile).max_num_seqs
    return max(places, sample.kv_usage)
