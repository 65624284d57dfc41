"""What a fleet could be: GPUs that come and go, and the ways to run the model on them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autopoiesis.arms.objective import Objective
from autopoiesis.arms.plan import Kind, Plan, ReplicaGroup, plan_from_plain, plan_to_plain
from autopoiesis.arms.slow_features import (
    FleetFeatures,
    GpuFeatures,
    ModelFeatures,
    OptionFeatures,
)
from autopoiesis.twin.capacity import ReplicaSpec
from autopoiesis.twin.latency import ClientOverhead, Profile, StepModel, step_s


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a replica: an engine on so many GPUs of a type."""

    gpu: str
    tensor_parallel: int
    profile: Profile


@dataclass(frozen=True, slots=True)
class GpuCourse:
    """One type of GPU, and how many of them there are from each time on."""

    name: str
    at_s: tuple[float, ...]
    """From 0, rising."""
    available: tuple[int, ...]
    price_usd_h: float = 1.0
    per_node: int = 8
    memory_gib: float = 80.0

    def __post_init__(self) -> None:
        times = np.asarray(self.at_s)
        if len(times) != len(self.available) or not len(times) or times[0] != 0.0:
            raise ValueError(f"{self.name}: needs a count for each time, the first at 0")
        if np.any(np.diff(times) <= 0) or min(self.available) < 0 or max(self.available) < 1:
            raise ValueError(f"{self.name}: times must rise, counts be at least 0, and once 1")

    def at(self, time_s: float) -> int:
        """Return how many there are at a time."""
        return self.available[int(np.searchsorted(self.at_s, time_s, "right")) - 1]


@dataclass(frozen=True, slots=True)
class Yard:
    """All that a plan for one model can be made of, and how long changes take."""

    model: str
    ways: tuple[Way, ...]
    gpus: tuple[GpuCourse, ...]
    first: Plan
    """What runs at the beginning."""
    window_s: float = 10.0
    load_s: float = 30.0
    engine_s: float = 20.0
    warmup_s: float = 0.0
    drain_s: float = 10.0
    """Expected time until a replica that gets nothing new is empty; what it takes in truth, the twin tells."""
    stop_s: float = 2.0
    stable_s: float = 300.0
    """How long the traffic is expected to stay as it is."""
    max_changes: int | None = None
    """Most replicas that may start or stop for one plan; None for any number."""

    def __post_init__(self) -> None:
        names = [gpu.name for gpu in self.gpus]
        if not self.ways or not self.gpus or len(set(names)) < len(names):
            raise ValueError("a yard needs a way to run the model, and each type of GPU once")
        for way in self.ways:
            if way.gpu not in names:
                raise ValueError(f"{way.profile.name} runs on {way.gpu}, of which there are none")
        for name, used in self.first.gpus().items():
            if name not in names or used > self.gpu(name).at(0.0):
                raise ValueError(f"the first plan uses {used} {name}, which are not there")

    def gpu(self, name: str) -> GpuCourse:
        """Return the type of GPU of that name."""
        return next(gpu for gpu in self.gpus if gpu.name == name)

    def way(self, gpu: str, tensor_parallel: int) -> Way:
        """Return the way to run the model there; StopIteration if there is none."""
        return next(w for w in self.ways if (w.gpu, w.tensor_parallel) == (gpu, tensor_parallel))

    def changes_s(self) -> list[float]:
        """Return when GPUs come or go, in order of time."""
        return sorted({at_s for gpu in self.gpus for at_s in gpu.at_s[1:]})

    def spec(self, kind: Kind, name: str) -> ReplicaSpec:
        """Return a replica of that kind as the twin simulates it."""
        profile = self.way(kind.gpu, kind.tensor_parallel).profile
        limited = replace(
            profile,
            max_num_seqs=min(kind.max_num_seqs, profile.max_num_seqs),
            max_num_batched_tokens=min(kind.max_num_batched_tokens, profile.max_num_batched_tokens),
        )
        return ReplicaSpec(name, limited)

    def features(
        self,
        at_s: float,
        lengths: tuple[float, float],
        objective: Objective,
        *,
        starting: int = 0,
        lost: int = 0,
    ) -> FleetFeatures:
        """Describe the fleet at a time to slow functions; `lengths` are mean prompt and output [tokens]."""
        return FleetFeatures(
            gpus=tuple(self._gpu_features(gpu, at_s) for gpu in self.gpus),
            nodes=(),
            models=(ModelFeatures(self.model, 0.0, 1),),
            options=tuple(self._option(way, lengths, objective) for way in self.ways),
            drain_s=self.drain_s,
            stop_s=self.stop_s,
            stable_s=self.stable_s,
            starting=starting,
            lost=lost,
        )

    def _gpu_features(self, gpu: GpuCourse, at_s: float) -> GpuFeatures:
        return GpuFeatures(
            name=gpu.name,
            total=max(gpu.available),
            available=gpu.at(at_s),
            available_before=gpu.at(max(at_s - self.window_s, 0.0)),
            leaving=0,
            arriving=0,
            per_node=gpu.per_node,
            price_usd_h=gpu.price_usd_h,
            memory_gib=gpu.memory_gib,
            speed=1.0,
        )

    def _option(
        self, way: Way, lengths: tuple[float, float], objective: Objective
    ) -> OptionFeatures:
        rps = capacity_rps(way.profile, *lengths, objective)
        return OptionFeatures(
            model=self.model,
            gpu=way.gpu,
            tensor_parallel=way.tensor_parallel,
            capacity_rps=rps,
            capacity_tokens_s=rps * sum(lengths),
            memory_gib=0.0,
            kv_tokens=way.profile.kv_tokens,
            load_s=self.load_s,
            engine_s=self.engine_s,
            warmup_s=self.warmup_s,
        )


def yard_to_plain(yard: Yard) -> dict[str, Any]:
    """Return the yard as JSON has it."""
    return asdict(yard) | {"first": plan_to_plain(yard.first)}


def yard_from_plain(plain: dict[str, Any]) -> Yard:
    """Read what `yard_to_plain` gives; KeyError, TypeError or ValueError if it is something else."""
    ways = tuple(
        Way(w["gpu"], w["tensor_parallel"], profile_from_plain(w["profile"])) for w in plain["ways"]
    )
    read: dict[str, Any] = dict(plain)
    read["ways"], read["first"] = ways, plan_from_plain(plain["first"])
    read["gpus"] = tuple(_gpu_from_plain(gpu) for gpu in plain["gpus"])
    return Yard(**read)


def _gpu_from_plain(plain: dict[str, Any]) -> GpuCourse:
    read: dict[str, Any] = dict(plain)
    read["at_s"], read["available"] = tuple(plain["at_s"]), tuple(plain["available"])
    return GpuCourse(**read)


def profile_from_plain(plain: dict[str, Any]) -> Profile:
    """Read a profile's fields; KeyError, TypeError or ValueError if they are others."""
    read: dict[str, Any] = dict(plain)
    read["step"], read["client"] = StepModel(**plain["step"]), ClientOverhead(**plain["client"])
    return Profile(**read)


def capacity_rps(
    profile: Profile, input_tokens: float, output_tokens: float, objective: Objective
) -> float:
    """Predict what one replica serves within the objectives [requests/s], from its step model.

    With n requests decoding, each gives a token per step, and between two of its tokens lies that part of the
    prompts that comes in meanwhile: tpot = step(n) + n/outputs * prefill. The largest n that keeps the
    objective, the KV cache and the engine's limit gives n / (outputs * tpot).
    """
    inputs, outputs = max(input_tokens, 1.0), max(output_tokens, 1.0)
    c = profile.step.as_array()
    whole = round(inputs)
    prefill_s = step_s(c, whole, 1, 1, 0, 0, whole, 0.5 * inputs * inputs, 0)
    if prefill_s > objective.slo_ttft_s:
        return 0.0
    context = inputs + outputs / 2.0
    most = min(profile.max_num_seqs, int(profile.kv_tokens / context))

    def tpot_s(n: int) -> float:
        step = step_s(c, n, n, n, n, round(n * context), 0, 0.0, 0)
        return step + n / outputs * prefill_s

    low, high = 0, most
    while low < high:  # tpot rises with n
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tpot_s(middle) <= objective.slo_tpot_s else (low, middle - 1)
    return low / (outputs * tpot_s(low)) if low else 0.0


def everything(yard_ways: Sequence[Way], gpus: Sequence[GpuCourse], model: str) -> Plan:
    """Return the plan that uses all GPUs that there are at first, each type in the first way given for it."""
    groups: list[ReplicaGroup] = []
    for gpu in gpus:
        way = next((w for w in yard_ways if w.gpu == gpu.name), None)
        count = gpu.at(0.0) // way.tensor_parallel if way else 0
        if way and count:
            groups.append(ReplicaGroup(model, gpu.name, way.tensor_parallel, count))
    whole = sum(group.replicas for group in groups)
    return Plan(tuple(replace(group, share=group.replicas / whole) for group in groups))
