"""Windows and fleets for tests of slow functions."""

from autopoiesis.arms import plan as plan_module
from autopoiesis.arms.seeds import slow_seeds
from autopoiesis.arms.slow_features import (
    DemandFeatures,
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    NodeFeatures,
    OptionFeatures,
    WindowFeatures,
)

SEEDS = {seed.name: seed for seed in slow_seeds()}


def gpu(name="H100", available=8, before=None, price=4.0, per_node=8):
    return GpuFeatures(
        name=name,
        total=available,
        available=available,
        available_before=available if before is None else before,
        leaving=0,
        arriving=0,
        per_node=per_node,
        price_usd_h=price,
        memory_gib=80.0,
        speed=1.0,
    )


def option(model="llama", on="H100", width=1, rps=2.0, start_s=60.0):
    return OptionFeatures(
        model=model,
        gpu=on,
        tensor_parallel=width,
        capacity_rps=rps,
        capacity_tokens_s=rps * 1500,
        memory_gib=20.0,
        kv_tokens=400_000,
        load_s=start_s / 2,
        engine_s=start_s / 3,
        warmup_s=start_s / 6,
    )


def fleet(gpus=None, options=None, models=("llama",), nodes=(), minimum=1, **values):
    defaults = {"drain_s": 20.0, "stop_s": 5.0, "stable_s": 600.0, "starting": 0, "lost": 0}
    return FleetFeatures(
        gpus=tuple([gpu()] if gpus is None else gpus),
        nodes=tuple(NodeFeatures(*node) for node in nodes),
        models=tuple(ModelFeatures(name, 16.0, minimum) for name in models),
        options=tuple([option()] if options is None else options),
        **{**defaults, **values},
    )


def window(rps=None, **values):
    """Make a window with these arrival rates by model."""
    demand = rps or {"llama": 6.0}
    rate = sum(demand.values())
    zero = {
        name: 0.0 for name in WindowFeatures._fields if name not in {"demand", "arrival_rates_rps"}
    }
    told = {
        **zero,
        "seconds": 10.0,
        "requests": round(10 * rate),
        "arrival_rate_rps": rate,
        "arrival_rate_change": 1.0,
        "arrival_rates_rps": (rate,) * 5,
        "utilisation": 0.75,
        "drifted": False,
        "windows_since_rescheduling": 10,
        "demand": tuple(DemandFeatures(m, r, 1000.0, 200.0) for m, r in demand.items()),
    }
    return WindowFeatures(**{**told, **values})


def functions(name):
    """Run a seed's text here, without a sandbox, and return its two functions."""
    names = {"Plan": plan_module.Plan, "ReplicaGroup": plan_module.ReplicaGroup}
    exec(SEEDS[name].policy.source, names)
    return names["should_reschedule"], names["schedule"]
