"""A change of plan replica by replica: from what runs and from a planner's new plan, uphill.

Written around any planner. A plan is judged by when the work that is known would be done: what keeps running
serves on while the others go and come, and the model that is done last counts. Replicas of one kind give way to
another kind on GPUs of the same type as long as that comes sooner; where it hardly does, what runs stays. Planners
say what a fleet should be from nothing, *in stages* takes a whole type of GPU over or leaves it; here one replica
is the least that changes. It finds out itself whether a change pays, so it has a trigger of its own: always.
"""

CLIMBING = """
import dataclasses
import numpy as np
AHEAD_S = 0.0
AFTER = 0.1
SURELY = 0.06

def climb_packs(nodes, widths):
    # Do replicas of these widths find places on nodes with so many free GPUs?
    left = list(nodes)
    for width in sorted(widths, reverse=True):
        fitting = [i for i, free in enumerate(left) if free >= width]
        if not fitting:
            return False
        left[min(fitting, key=lambda i: left[i])] -= width
    return True

def climb_done_s(window, fleet, options, before, rows):
    # Return for each row of counts by kind when all is done, the change included; the others count a little.
    models = [m.name for m in fleet.models]
    of = np.array([[o.model == m for m in models] for o in options])
    rates = of * np.array([o.capacity_rps for o in options])[:, None]
    asks = {d.model: d.arrival_rate_rps for d in window.demand}
    asked = np.array([asks.get(m, 0.0) for m in models])
    total = window.unfinished + AHEAD_S * asked.sum()
    work = total * asked / max(asked.sum(), 1e-9)
    come = np.maximum(rows @ rates, 1e-6)
    change_s, kept = np.zeros((len(rows), 1)), come
    if before.any():
        kept = np.maximum(np.minimum(rows, before) @ rates, 1e-9)
        starts = np.where(rows > before, [o.start_s for o in options], 0.0).max(axis=1)
        stops = (rows < before).any(axis=1) * (fleet.drain_s + fleet.stop_s)
        change_s = (starts + stops)[:, None]
    late_s = change_s + (work - kept * change_s) / come
    done_s = np.maximum(np.where(work <= kept * change_s, work / kept, late_s), AHEAD_S)
    usual_s = np.maximum((total / len(models) / come).max(axis=1), AHEAD_S)
    lacks = (rows @ of < [m.minimum_replicas for m in fleet.models]).any(axis=1)
    return done_s.max(axis=1) + AFTER * usual_s + 1e-4 * done_s.sum(axis=1) + 1e9 * lacks

def climb_steps(fleet, options, counts):
    # Return what counts become when replicas of one kind give way to another kind, or find free GPUs.
    rows = []
    for gpu in fleet.gpus:
        here = [i for i, o in enumerate(options) if o.gpu == gpu.name]
        free = gpu.available - sum(counts[i] * options[i].tensor_parallel for i in here)
        gone = [(i, n) for i in here for n in {1, 2, 4, 8, counts[i]} if 0 < n <= counts[i]]
        for new in here:
            for old, n in [(new, 0), *gone]:
                come = (free + n * options[old].tensor_parallel) // options[new].tensor_parallel
                if come > 0 and (old != new or not n):
                    row = counts.copy()
                    row[old] -= n
                    row[new] += come if n else 1
                    rows.append(row)
    return rows

def climb_fits(fleet, options, counts):
    for gpu in fleet.gpus:
        nodes = [n.available for n in fleet.nodes if n.gpu == gpu.name] or [gpu.available]
        widths = [o.tensor_parallel for o, n in zip(options, counts) if o.gpu == gpu.name for _ in range(n)]
        if not climb_packs(nodes, widths):
            return False
    return True

def climb(window, fleet, options, before, counts):
    best = climb_done_s(window, fleet, options, before, counts[None])[0]
    for _ in range(64):
        rows = climb_steps(fleet, options, counts)
        if not rows:
            break
        done = climb_done_s(window, fleet, options, before, np.array(rows))
        better = [i for i in np.argsort(done, kind="stable") if done[i] < best - 1e-6]
        found = next((i for i in better if climb_fits(fleet, options, rows[i])), None)
        if found is None:
            break
        best, counts = done[found], rows[found]
    return best, counts

def schedule(window, fleet, plan):
    plain = [ReplicaGroup(*o[:3], 1) for o in fleet.options if o.capacity_rps > 0.0]
    groups = {g.kind: g for g in (*plain, *plan.groups)}
    options = [fleet.option(k.model, k.gpu, k.tensor_parallel) for k in groups]
    there = {gpu.name: gpu.available for gpu in fleet.gpus}
    runs = bool(plan.groups) and all(n <= there.get(gpu, 0) for gpu, n in plan.gpus().items())
    if not options or None in options:
        return whole_schedule(window, fleet, plan)
    before = np.array([plan.kinds()[k] for k in groups]) * runs
    found = []
    if runs:
        found.append(climb(window, fleet, options, before, before))
        as_is = climb_done_s(window, fleet, options, before, before[None])[0]
        if found[0][0] > (1.0 - SURELY) * as_is:
            return plan
    wanted = whole_schedule(window, fleet, plan)
    if any(g.kind not in groups for g in wanted.groups):
        return wanted
    found.append(climb(window, fleet, options, before, np.array([wanted.kinds()[k] for k in groups])))
    counts = min(found, key=lambda each: each[0])[1]
    serves = {k: (n, n * max(o.capacity_rps, 1e-9)) for k, n, o in zip(groups, counts, options) if n}
    whole = {m.name: sum(w for k, (_, w) in serves.items() if k.model == m.name) for m in fleet.models}
    return Plan([
        dataclasses.replace(groups[k], replicas=int(n), share=float(w / whole[k.model]))
        for k, (n, w) in serves.items()
    ])

def should_reschedule(window, fleet, plan):
    return True
"""
