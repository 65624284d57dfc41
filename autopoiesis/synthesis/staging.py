"""A change of plan in stages: a planner's new plan is taken over on those types of GPU where it pays.

Written around any planner. For each set of GPU types it asks what part of the worst served model's demand
would be served within `STAGED_S`, if those took the new plan and the others kept what runs; what leaves and
comes serves nothing meanwhile. Neither "all" (full migration) nor "as little as possible" (minimal) decides
how far a change goes, but what it earns.
"""

INNER = "whole_schedule"
"""Name under which the planner stands inside."""
STAGED = """
import dataclasses
STAGED_S = 60.0

def staged_worth(window, fleet, plan, wanted):
    # Return the part of the demand of the worst served model that is served within STAGED_S, the change included.
    change_s = min(fleet.migration_s(plan, wanted), STAGED_S)
    before, after = plan.kinds(), wanted.kinds()
    worst = None
    for demand in window.demand:
        kept = come = 0.0
        for kind, count in after.items():
            option = fleet.option(kind.model, kind.gpu, kind.tensor_parallel)
            if kind.model == demand.model and option is not None:
                come += count * option.capacity_rps
                kept += min(count, before.get(kind, 0)) * option.capacity_rps
        part = (change_s * kept + (STAGED_S - change_s) * come) / max(demand.arrival_rate_rps, 1e-9)
        worst = part if worst is None else min(worst, part)
    return worst or 0.0

def staged_plan(fleet, groups):
    # Return the plan of these groups, traffic shared out by what they serve.
    def weight(group):
        option = fleet.option(group.model, group.gpu, group.tensor_parallel)
        return group.replicas * max(option.capacity_rps if option else 0.0, 1e-9)
    whole = {}
    for group in groups:
        whole[group.model] = whole.get(group.model, 0.0) + weight(group)
    return Plan([dataclasses.replace(g, share=weight(g) / whole[g.model]) for g in groups])

def schedule(window, fleet, plan):
    wanted = whole_schedule(window, fleet, plan)
    there = {gpu.name: gpu.available for gpu in fleet.gpus}
    if not plan.groups or any(used > there.get(gpu, 0) for gpu, used in plan.gpus().items()):
        return wanted
    best, most = plan, staged_worth(window, fleet, plan, plan)
    for mask in range(1, 2 ** min(len(fleet.gpus), 5)):
        new = {gpu.name for i, gpu in enumerate(fleet.gpus) if mask >> i & 1 or i >= 5}
        groups = [g for g in plan.groups if g.gpu not in new] + [g for g in wanted.groups if g.gpu in new]
        mixed = staged_plan(fleet, groups)
        if any(mixed.replicas(model.name) < model.minimum_replicas for model in fleet.models):
            continue
        worth = staged_worth(window, fleet, plan, mixed)
        if worth > most:
            best, most = mixed, worth
    return best
"""
