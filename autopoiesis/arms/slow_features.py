"""The features slow functions see: the last window, and the fleet with what it could be.

A slow function reads them as `window.arrival_rate_rps`, `fleet.gpus`. The names are a contract. What
has a name in `features` too means the same here, over all groups of the fleet.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from autopoiesis.arms.plan import Kind, Plan


class DemandFeatures(NamedTuple):
    """One model's part of the window's traffic."""

    model: str
    """Model, by its name in `fleet.models`."""
    arrival_rate_rps: float
    """Arrivals for it [requests/s]."""
    input_tokens_mean: float
    """Mean prompt length [tokens]."""
    output_tokens_mean: float
    """Mean output length of finished requests [tokens]."""


class WindowFeatures(NamedTuple):
    """What happened in the window that ended last. In one without requests, means and percentiles are 0."""

    seconds: float
    """Length of the window [s]."""
    requests: int
    """Requests that arrived."""
    completed: int
    """Those of them that were served."""
    shed: int
    """Those refused with 429."""
    failed: int
    """Those that a replica failed."""
    unfinished: int
    """Those in the fleet or held when the window ended."""
    arrival_rate_rps: float
    """Arrivals [requests/s]."""
    arrival_rate_change: float
    """Arrival rate relative to the window before it (1 = equal, also where that had none)."""
    arrival_rates_rps: tuple[float, ...]
    """Arrival rates of up to 60 windows [requests/s], oldest first, this one last."""
    arrival_burstiness: float
    """Coefficient of variation of the time between arrivals (1 = Poisson)."""
    input_tokens_mean: float
    """Mean prompt length [tokens]."""
    input_tokens_p99: float
    """99th percentile of the prompt length [tokens]."""
    input_tokens_change: float
    """Mean prompt length relative to the window before it (1 = equal)."""
    output_tokens_mean: float
    """Mean output length of finished requests [tokens]."""
    output_tokens_p99: float
    """99th percentile of the output length of finished requests [tokens]."""
    output_tokens_change: float
    """Mean output length relative to the window before it (1 = equal)."""
    prefix_share: float
    """Share of prompt tokens that some replica's prefix cache held [0..1]."""
    ttft_p50_s: float
    """Median time to first token [s]."""
    ttft_p99_s: float
    """99th percentile of the time to first token [s]."""
    tpot_p50_s: float
    """Median time per output token [s]."""
    tpot_p99_s: float
    """99th percentile of the time per output token [s]."""
    e2e_mean_s: float
    """Mean time from arrival to the last token [s]."""
    goodput_rps: float
    """Requests that met both objectives [requests/s]."""
    utility: float
    """Mean utility of the window's requests [0..1]: 1 if all met both objectives, 0 for shed and failed."""
    throughput_tokens_s: float
    """Prompt and output tokens computed [tokens/s]."""
    utilisation: float
    """Arrivals over what the plan's replicas are predicted to serve within the objectives; above 1 it is too small."""
    in_flight_mean: float
    """Requests at replicas, mean over the window."""
    waiting_mean: float
    """Requests in the replicas' own queues, mean over the window."""
    held_mean: float
    """Requests held at the gateway, mean over the window."""
    kv_usage_mean: float
    """Share of KV cache in use [0..1], mean over replicas and the window."""
    kv_usage_max: float
    """The same of the fullest replica at its fullest."""
    preemptions: int
    """Requests that replicas pushed out of their batch for lack of KV cache."""
    drifted: bool
    """Whether a drift detector fired in this window."""
    regret: float
    """Utility that the best arm would have had over what the window had, as estimated [0..1]."""
    windows_since_rescheduling: int
    """Windows that ended since the plan last changed, this one included."""
    seconds_since_rescheduling: float
    """Time since the plan last changed and was carried out [s]."""
    slo_ttft_s: float
    """Objective for the time to first token [s]."""
    slo_tpot_s: float
    """Objective for the time per output token [s]."""
    demand: tuple[DemandFeatures, ...]
    """The traffic by model: every model of `fleet.models` once."""


class GpuFeatures(NamedTuple):
    """One type of GPU."""

    name: str
    """Its name."""
    total: int
    """GPUs of this type that belong to the fleet, broken ones too."""
    available: int
    """GPUs that a plan may use now; those that the current plan uses are among them."""
    available_before: int
    """The same one window ago."""
    leaving: int
    """Of those available, how many are announced to go away (spot instances with notice)."""
    arriving: int
    """GPUs that are announced to come and are not available yet."""
    per_node: int
    """GPUs of this type on one node; a replica cannot span more."""
    price_usd_h: float
    """Price of one GPU [USD/h]; 0 where nothing is known."""
    memory_gib: float
    """Memory of one GPU [GiB]."""
    speed: float
    """Its speed relative to the fleet's reference GPU (1 = equal)."""


class NodeFeatures(NamedTuple):
    """One machine."""

    name: str
    """Its name."""
    gpu: str
    """Type of its GPUs."""
    available: int
    """Of its GPUs, those that a plan may use now."""


class ModelFeatures(NamedTuple):
    """One model that the fleet serves."""

    name: str
    """Its name."""
    weights_gib: float
    """Size of its weights [GiB]."""
    minimum_replicas: int
    """Fewest replicas that a plan must give it."""


class OptionFeatures(NamedTuple):
    """One way to run a replica of a model: on `tensor_parallel` GPUs of a type. Only those that fit are there."""

    model: str
    """Model, by its name in `fleet.models`."""
    gpu: str
    """GPU type, by its name in `fleet.gpus`."""
    tensor_parallel: int
    """GPUs that the replica spans."""
    capacity_rps: float
    """What one such replica is predicted to serve within the objectives, at this window's lengths [requests/s]."""
    capacity_tokens_s: float
    """The same in prompt and output tokens [tokens/s]."""
    memory_gib: float
    """Memory that it takes on each GPU without KV cache [GiB]."""
    kv_tokens: int
    """Tokens that its KV cache holds."""
    load_s: float
    """Time to load the weights [s]."""
    engine_s: float
    """Time to start the engine and to capture its graphs [s]."""
    warmup_s: float
    """Time until a started replica is as fast as the others, its prefix cache being cold [s]."""

    @property
    def start_s(self) -> float:
        """Time from the command to start to full speed [s]: load, engine and warm-up."""
        return self.load_s + self.engine_s + self.warmup_s


class FleetFeatures(NamedTuple):
    """What the fleet has and could be."""

    gpus: tuple[GpuFeatures, ...]
    """GPU types."""
    nodes: tuple[NodeFeatures, ...]
    """Machines; none where they are not known."""
    models: tuple[ModelFeatures, ...]
    """Models to serve."""
    options: tuple[OptionFeatures, ...]
    """Ways to run them."""
    drain_s: float
    """Time until a replica that gets nothing new is empty [s]."""
    stop_s: float
    """Time from then until its GPUs are free [s]."""
    stable_s: float
    """How long the traffic is expected to stay as it is [s]: what a change of plan has to pay off in."""
    starting: int
    """Replicas of the current plan that are not ready yet."""
    lost: int
    """Replicas of the current plan that are gone."""

    def gpu(self, name: str) -> GpuFeatures | None:
        """Return the GPU type of that name, None if there is none."""
        return next((gpu for gpu in self.gpus if gpu.name == name), None)

    def model(self, name: str) -> ModelFeatures | None:
        """Return the model of that name, None if there is none."""
        return next((model for model in self.models if model.name == name), None)

    def option(self, model: str, gpu: str, tensor_parallel: int) -> OptionFeatures | None:
        """Return the way to run the model there, None if it does not fit."""
        wanted = (model, gpu, tensor_parallel)
        return next((option for option in self.options if option[:3] == wanted), None)

    def capacity_rps(self, plan: Plan, model: str) -> float:
        """Return what the plan is predicted to serve of the model [requests/s], by its "serve" groups."""
        capacity = 0.0
        for group in plan.groups:
            if group.model == model and group.role == "serve":
                option = self.option(group.model, group.gpu, group.tensor_parallel)
                capacity += group.replicas * option.capacity_rps if option else 0.0
        return capacity

    def migration_s(self, old: Plan, new: Plan) -> float:
        """Return the predicted time from one plan to the other [s]; 0 if only shares differ.

        What goes is drained and stopped first, then everything starts at once; the slowest counts.
        """
        before, after = old.kinds(), new.kinds()
        stopping = self.drain_s + self.stop_s if before - after else 0.0
        starting = max((self._start_s(kind) for kind in after - before), default=0.0)
        return stopping + starting

    def _start_s(self, kind: Kind) -> float:
        option = self.option(kind.model, kind.gpu, kind.tensor_parallel)
        return option.start_s if option else 0.0


_SCALARS = frozenset({int, float, bool, str})


def to_plain(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a window's or a fleet's values as plain tuples, NumPy's numbers as Python's."""
    if _SCALARS.issuperset(map(type, values)):
        return (*values,)
    plain = [
        value
        if type(value) in _SCALARS
        else to_plain(value)
        if isinstance(value, tuple)
        else value.item()
        for value in values
    ]  # quicker than to build the tuple value by value
    return (*plain,)


def window_from_plain(values: Sequence[Any]) -> WindowFeatures:
    """Read what `to_plain` made of a window."""
    *others, demand = values
    return WindowFeatures(*others, demand=tuple(DemandFeatures(*each) for each in demand))


def fleet_from_plain(values: Sequence[Any]) -> FleetFeatures:
    """Read what `to_plain` made of a fleet."""
    gpus, nodes, models, options, *others = values
    return FleetFeatures(
        tuple(GpuFeatures(*x) for x in gpus),
        tuple(NodeFeatures(*x) for x in nodes),
        tuple(ModelFeatures(*x) for x in models),
        tuple(OptionFeatures(*x) for x in options),
        *others,
    )
