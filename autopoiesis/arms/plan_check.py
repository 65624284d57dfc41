"""Whether a plan can be carried out on a fleet: what is wrong with it, in sentences."""

import math
from collections import Counter
from dataclasses import dataclass

from autopoiesis.arms.plan import Kind, Plan, ReplicaGroup
from autopoiesis.arms.slow_features import FleetFeatures

SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What an operator allows beside what the hardware does."""

    roles: tuple[str, ...] = ("serve",)
    """Roles that the fleet's backend can run."""
    max_num_seqs: int = 4096
    """Most requests that a replica may compute at once."""
    max_num_batched_tokens: int = 131_072
    """Most tokens that a replica may compute in one step."""
    max_changes: int | None = None
    """Most replicas that may start or stop between two plans; None for any number."""


def check(
    plan: Plan, fleet: FleetFeatures, limits: PlanLimits | None = None, current: Plan | None = None
) -> list[str]:
    """Return what keeps the plan from being carried out, one sentence each; empty if nothing does.

    `current` is the plan that runs, for the limit on changes.
    """
    limits = limits or PlanLimits()
    faults: list[str] = []
    for i, group in enumerate(plan.groups):
        faults += _group(f"groups[{i}]", group, fleet, limits)
    faults += _capacity(plan, fleet)
    if not faults:  # sizes are known to be sound now
        faults += _placement(plan, fleet)
    faults += _models(plan, fleet)
    if current is not None and limits.max_changes is not None:
        faults += _changes(current.kinds(), plan.kinds(), limits.max_changes)
    return faults


def _group(where: str, group: ReplicaGroup, fleet: FleetFeatures, limits: PlanLimits) -> list[str]:
    faults: list[str] = []
    gpu = fleet.gpu(group.gpu)
    if fleet.model(group.model) is None:
        known = ", ".join(model.name for model in fleet.models)
        faults.append(f"{where}.model {group.model!a} is not served here; models: {known}")
    if gpu is None:
        known = ", ".join(gpu.name for gpu in fleet.gpus)
        faults.append(f"{where}.gpu {group.gpu!a} is not in the fleet; types: {known}")
    faults += [
        f"{where}.{name} is {getattr(group, name)}; it must be at least 1"
        for name in ("tensor_parallel", "replicas", "max_num_seqs", "max_num_batched_tokens")
        if getattr(group, name) < 1
    ]
    faults += [
        f"{where}.{name} is {getattr(group, name)}; at most {getattr(limits, name)} is allowed"
        for name in ("max_num_seqs", "max_num_batched_tokens")
        if getattr(group, name) > getattr(limits, name)
    ]
    if not 0.0 <= group.share <= 1.0:
        faults.append(f"{where}.share is {group.share}; it must be from 0 to 1")
    if group.role not in limits.roles:
        offered = ", ".join(limits.roles)
        faults.append(f"{where}.role {group.role!a} is not offered here; roles: {offered}")
    if not faults and fleet.option(group.model, group.gpu, group.tensor_parallel) is None:
        ways = [
            o.tensor_parallel for o in fleet.options if (o.model, o.gpu) == (group.model, group.gpu)
        ]
        possible = ", ".join(map(str, sorted(ways))) or "none"
        faults.append(
            f"{where}: {group.model} does not run on {group.tensor_parallel} x {group.gpu}; "
            f"tensor_parallel there: {possible}"
        )
    return faults


def _capacity(plan: Plan, fleet: FleetFeatures) -> list[str]:
    faults: list[str] = []
    for name, used in plan.gpus().items():
        gpu = fleet.gpu(name)
        if gpu is not None and used > gpu.available:
            faults.append(f"the plan uses {used} {name}, of which {gpu.available} are available")
    return faults


def _placement(plan: Plan, fleet: FleetFeatures) -> list[str]:
    """Place replicas on nodes, the widest first, each where the fewest GPUs are left that suffice.

    For tensor-parallel degrees that divide one another, such as powers of two, that finds a
    placement whenever there is one.
    """
    faults: list[str] = []
    for name in plan.gpus():
        free = [node.available for node in fleet.nodes if node.gpu == name]
        if not free:
            continue
        wanted = Counter[int]()
        for group in plan.groups:
            if group.gpu == name:
                wanted[group.tensor_parallel] += group.replicas
        for width in sorted(wanted, reverse=True):
            left = _place(free, width, wanted[width])
            if left:
                faults.append(
                    f"{left} replicas of tensor_parallel {width} find no node with {width} free {name}"
                )
                break
    return faults


def _place(free: list[int], width: int, replicas: int) -> int:
    """Take GPUs from the nodes; return how many replicas found no place."""
    for i in sorted(range(len(free)), key=lambda i: free[i]):
        placed = min(free[i] // width, replicas)
        free[i] -= placed * width
        replicas -= placed
    return replicas


def _models(plan: Plan, fleet: FleetFeatures) -> list[str]:
    faults: list[str] = []
    for model in fleet.models:
        have = plan.replicas(model.name)
        if have < model.minimum_replicas:
            faults.append(
                f"{model.name} has {have} replicas; it needs at least {model.minimum_replicas}"
            )
        groups = [group for group in plan.groups if group.model == model.name]
        roles = {group.role for group in groups}
        if roles and roles not in ({"serve"}, {"prefill", "decode"}):
            faults.append(
                f"{model.name} has groups of role {' and '.join(sorted(roles))}; "
                "a model has groups of role serve, or both prefill and decode"
            )
        for role in sorted(roles):
            shares = [group.share for group in groups if group.role == role]
            if not math.isclose(sum(shares), 1.0, abs_tol=SHARE_TOLERANCE):
                faults.append(
                    f"the shares of {model.name}'s {role} groups sum to {sum(shares):g}; they must sum to 1"
                )
    return faults


def _changes(before: Counter[Kind], after: Counter[Kind], most: int) -> list[str]:
    changes = (before - after).total() + (after - before).total()
    if changes <= most:
        return []
    return [f"the plan starts or stops {changes} replicas; at most {most} may change at once"]
