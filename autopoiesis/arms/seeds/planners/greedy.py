# Greedy from nothing: give the model that is furthest from what it needs the replica that serves most
# for its price, until all have enough or no GPU is left; what runs does not count.
HEADROOM = 1.3


def schedule(window, fleet, plan):
    free = {
        gpu.name: [node.available for node in fleet.nodes if node.gpu == gpu.name]
        or [gpu.available]
        for gpu in fleet.gpus
    }
    price = {gpu.name: gpu.price_usd_h or 1.0 for gpu in fleet.gpus}
    needed = {d.model: HEADROOM * d.arrival_rate_rps for d in window.demand}
    missing = {model.name: model.minimum_replicas for model in fleet.models}
    capacity = dict.fromkeys(missing, 0.0)
    counts = {}

    def place(option):
        nodes = free[option.gpu]
        fitting = [i for i, left in enumerate(nodes) if left >= option.tensor_parallel]
        if fitting:
            nodes[min(fitting, key=lambda i: nodes[i])] -= option.tensor_parallel
        return bool(fitting)

    def grow(model):
        """Start the best replica of the model that finds a place."""
        options = [option for option in fleet.options if option.model == model]
        options.sort(key=lambda o: -o.capacity_rps / (o.tensor_parallel * price[o.gpu]))
        for option in options:
            if place(option):
                counts[option] = counts.get(option, 0) + 1
                capacity[model] += option.capacity_rps
                missing[model] -= 1
                return True
        return False

    def hunger(model):
        """Minimum replicas first, then the smallest part of what is needed."""
        return (missing[model] <= 0, capacity[model] / max(needed.get(model, 0.0), 1e-9))

    hungry = set(missing)
    while hungry:
        model = min(sorted(hungry), key=hunger)
        enough = missing[model] <= 0 and capacity[model] >= needed.get(model, 0.0)
        if enough or not grow(model):
            hungry.discard(model)

    def weight(option):
        return counts[option] * (option.capacity_rps or 1e-9)

    groups = []
    for option, count in counts.items():
        whole = sum(weight(o) for o in counts if o.model == option.model)
        groups.append(ReplicaGroup(*option[:3], count, share=weight(option) / whole))
    return Plan(groups)
