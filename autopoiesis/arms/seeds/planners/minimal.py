# Minimal migration: what runs stays. Give up what the GPUs no longer hold and what is clearly too
# much, one replica at a time, then add until every model has enough (the paper's "minimal" row).
HEADROOM = 1.3
SURPLUS = 2.0


def schedule(window, fleet, plan):
    needed = {d.model: HEADROOM * d.arrival_rate_rps for d in window.demand}
    minimum = {model.name: model.minimum_replicas for model in fleet.models}
    options = {option[:3]: option for option in fleet.options}
    counts = {}
    limits = {}
    for group in plan.groups:
        key = (group.model, group.gpu, group.tensor_parallel)
        if key in options:
            counts[key] = counts.get(key, 0) + group.replicas
            limits[key] = (group.max_num_seqs, group.max_num_batched_tokens)

    def capacity(model, without=None):
        replicas = sum(n * options[k].capacity_rps for k, n in counts.items() if k[0] == model)
        return replicas - (options[without].capacity_rps if without else 0.0)

    def replicas(model):
        return sum(n for key, n in counts.items() if key[0] == model)

    def crowded():
        """Return a type of GPU on which the replicas find no place, the widest first, None if all do."""
        for gpu in fleet.gpus:
            free = [n.available for n in fleet.nodes if n.gpu == gpu.name] or [gpu.available]
            widths = [k[2] for k, n in counts.items() if k[1] == gpu.name for _ in range(n)]
            for width in sorted(widths, reverse=True):
                fitting = [i for i, left in enumerate(free) if left >= width]
                if not fitting:
                    return gpu.name
                free[min(fitting, key=lambda i: free[i])] -= width
        return None

    def change(key, by):
        counts[key] = counts.get(key, 0) + by

    def spare(key):
        """How well its model would do without one of these replicas."""
        below = replicas(key[0]) <= minimum[key[0]]
        return (not below, capacity(key[0], without=key) / max(needed.get(key[0], 0.0), 1e-9))

    def hunger(model):
        """Minimum replicas first, then the smallest part of what is needed."""
        part = capacity(model) / max(needed.get(model, 0.0), 1e-9)
        return (replicas(model) >= minimum[model], part)

    def grow(model):
        """Start a replica of the kind that runs if it finds a place, else of what serves most per GPU."""
        ways = [key for key in options if key[0] == model]
        ways.sort(key=lambda k: (counts.get(k, 0) == 0, -options[k].capacity_rps / k[2]))
        for key in ways:
            change(key, 1)
            if crowded() is None:
                return True
            change(key, -1)
        return False

    while (gpu := crowded()) is not None:
        there = [key for key, n in counts.items() if n > 0 and key[1] == gpu]
        change(max(there, key=spare), -1)
    while surplus := [key for key, n in counts.items() if n > 0 and spare(key) >= (True, SURPLUS)]:
        change(max(surplus, key=spare), -1)
    hungry = set(minimum)
    while hungry:
        model = min(sorted(hungry), key=hunger)
        enough = replicas(model) >= minimum[model] and capacity(model) >= needed.get(model, 0.0)
        if enough or not grow(model):
            hungry.discard(model)

    def weight(key):
        return counts[key] * (options[key].capacity_rps or 1e-9)

    groups = []
    for key, count in counts.items():
        if count > 0:
            whole = sum(weight(k) for k in counts if k[0] == key[0])
            seqs, tokens = limits.get(key, (256, 8192))
            groups.append(ReplicaGroup(*key, count, seqs, tokens, share=weight(key) / whole))
    return Plan(groups)
