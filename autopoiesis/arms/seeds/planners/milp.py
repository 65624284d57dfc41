# Mixed-integer program over replica counts, as in HexGen's and the cost-efficiency study's planners:
# first serve the largest equal part of every model's demand, then do so for the least money.
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

HEADROOM = 1.3
TIME_LIMIT_S = 5.0


def schedule(window, fleet, plan):
    options = fleet.options
    needed = {d.model: HEADROOM * d.arrival_rate_rps for d in window.demand}
    rows, low, high = [], [], []

    def constrain(coefficients, part, at_least, at_most):
        rows.append([*coefficients, part])
        low.append(at_least)
        high.append(at_most)

    for model in fleet.models:
        mine = [option.model == model.name for option in options]
        constrain(mine, 0.0, model.minimum_replicas, np.inf)
        serves = [option.capacity_rps * own for option, own in zip(options, mine)]
        constrain(serves, -needed.get(model.name, 0.0), 0.0, np.inf)
    for gpu in fleet.gpus:
        nodes = [n.available for n in fleet.nodes if n.gpu == gpu.name] or [gpu.available]
        widths = {1} | {option.tensor_parallel for option in options if option.gpu == gpu.name}
        for width in widths:
            # Wide replicas take several places of this width; places lie within a node.
            takes = [
                o.tensor_parallel / width
                if o.gpu == gpu.name and o.tensor_parallel >= width
                else 0.0
                for o in options
            ]
            constrain(takes, 0.0, 0.0, sum(left // width for left in nodes))

    def solve(objective, least_part):
        return milp(
            objective,
            integrality=[*np.ones(len(options)), 0],
            bounds=Bounds(
                [*np.zeros(len(options)), least_part], [*np.full(len(options), np.inf), 1.0]
            ),
            constraints=LinearConstraint(np.array(rows, float), low, high),
            options={"time_limit": TIME_LIMIT_S},
        ).x

    price = {gpu.name: gpu.price_usd_h or 1.0 for gpu in fleet.gpus}
    cost = [option.tensor_parallel * price[option.gpu] for option in options]
    most = solve([*np.zeros(len(options)), -1.0], 0.0)
    if most is None:
        return plan
    cheapest = solve([*cost, 0.0], max(most[-1] - 1e-6, 0.0))
    counts = np.round(most if cheapest is None else cheapest)[:-1].astype(int)

    def weight(option, count):
        return count * (option.capacity_rps or 1e-9)

    chosen = [(option, int(count)) for option, count in zip(options, counts) if count]
    groups = []
    for option, count in chosen:
        whole = sum(weight(o, n) for o, n in chosen if o.model == option.model)
        groups.append(ReplicaGroup(*option[:3], count, share=weight(option, count) / whole))
    return Plan(groups)
