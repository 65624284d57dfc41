"""What a plan is: which models run on which GPUs, with which limits, for which part of the traffic.

Slow functions get the current plan and return the next one. Plans are values; `plan_check` says what
is wrong with one, `migration` what it takes to get from one to another.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

ROLES = ("serve", "prefill", "decode")
MAX_GROUPS = 256
MAX_NAME = 200
"""Characters in the name of a model or of a GPU type."""


class PlanError(ValueError):
    """Something is not a plan. The message names the field, what it is and what it must be."""


class Kind(NamedTuple):
    """What makes two replicas interchangeable; a replica of one kind becomes another by restarting."""

    model: str
    gpu: str
    tensor_parallel: int
    max_num_seqs: int
    max_num_batched_tokens: int
    role: str


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """Equal replicas of one model."""

    model: str
    """Model, by its name in `fleet.models`."""
    gpu: str
    """GPU type, by its name in `fleet.gpus`."""
    tensor_parallel: int = 1
    """GPUs that one replica spans; all of them on one node."""
    replicas: int = 1
    """How many of them."""
    max_num_seqs: int = 256
    """Requests that a replica computes at once (vLLM's max_num_seqs)."""
    max_num_batched_tokens: int = 8192
    """Tokens that a replica computes in one step (vLLM's max_num_batched_tokens)."""
    role: str = "serve"
    """"serve" does all of a request; "prefill" computes prompts, "decode" continues them."""
    share: float = 1.0
    """Part of the model's traffic [0..1]; the shares of a model's groups of one role sum to 1."""

    @property
    def gpus(self) -> int:
        """GPUs that the group occupies."""
        return self.tensor_parallel * self.replicas

    @property
    def kind(self) -> Kind:
        """What its replicas are, however many and however used."""
        return Kind(
            self.model, self.gpu, self.tensor_parallel, self.max_num_seqs, self.max_num_batched_tokens, self.role
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What the fleet is, or is to become. Without groups nothing runs: a cold start."""

    groups: tuple[ReplicaGroup, ...] = ()
    """The replicas, in groups of equal ones."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))

    def gpus(self) -> dict[str, int]:
        """Return how many GPUs of each type the plan occupies."""
        used = Counter[str]()
        for group in self.groups:
            used[group.gpu] += group.gpus
        return dict(used)

    def replicas(self, model: str) -> int:
        """Return how many replicas the model has that can take requests (not those that only decode)."""
        return sum(g.replicas for g in self.groups if g.model == model and g.role != "decode")

    def kinds(self) -> Counter[Kind]:
        """Return how many replicas there are of each kind."""
        counted = Counter[Kind]()
        for group in self.groups:
            counted[group.kind] += group.replicas
        return counted


def plan_to_plain(plan: Plan) -> dict[str, object]:
    """Return the plan as JSON has it."""
    return {"groups": [asdict(group) for group in plan.groups]}


def plan_from_plain(value: object) -> Plan:
    """Read what `plan_to_plain` gives. Raises PlanError: whatever the value, one sentence."""
    if not isinstance(value, Mapping):
        raise PlanError(f"a plan must be an object with `groups`, got {_shown(value)}")
    _only(value, "a plan", ("groups",))
    groups = value.get("groups")
    if not isinstance(groups, list | tuple):
        raise PlanError(f"groups must be a list, got {_shown(groups)}")
    if len(groups) > MAX_GROUPS:
        raise PlanError(f"groups has {len(groups)} entries; at most {MAX_GROUPS} are possible")
    return Plan(tuple(_group(f"groups[{i}]", group) for i, group in enumerate(groups)))


_WHOLE = {
    "tensor_parallel": 1024,
    "replicas": 65536,
    "max_num_seqs": 65536,
    "max_num_batched_tokens": 1 << 24,
}
"""Fields that hold whole numbers, with the largest that is no obvious mistake."""
_GROUP = tuple(field.name for field in fields(ReplicaGroup))


def _group(where: str, value: object) -> ReplicaGroup:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} must be an object, got {_shown(value)}")
    _only(value, where, _GROUP)
    read: dict[str, object] = {}
    for name in ("model", "gpu"):
        text = value.get(name)
        if not isinstance(text, str) or not 0 < len(text) <= MAX_NAME:
            raise PlanError(
                f"{where}.{name} must be a name of 1 to {MAX_NAME} characters, got {_shown(text)}"
            )
        read[name] = text
    for name, largest in _WHOLE.items():
        if name in value:
            read[name] = _whole(f"{where}.{name}", value[name], largest)
    role = value.get("role", "serve")
    if role not in ROLES:
        raise PlanError(f"{where}.role must be one of {', '.join(ROLES)}, got {_shown(role)}")
    share = value.get("share", 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        raise PlanError(f"{where}.share must be a number from 0 to 1, got {_shown(share)}")
    return ReplicaGroup(**read, role=role, share=float(share))  # type: ignore[arg-type]


def _whole(where: str, value: object, largest: int) -> int:
    number = value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= largest:
        raise PlanError(f"{where} must be a whole number from 1 to {largest}, got {_shown(value)}")
    return number


def _only(value: Mapping[object, object], where: str, names: tuple[str, ...]) -> None:
    for name in value:
        if name not in names:
            raise PlanError(f"{where} has no field {_shown(name)}; its fields: {', '.join(names)}")


def _shown(value: object) -> str:
    """Return the value, or its type if it is long, for a sentence."""
    if value is None:
        return "nothing"
    if isinstance(value, str | int | float) and not (
        isinstance(value, int) and abs(value) > 10**15
    ):
        return ascii(value)[:40]
    return f"a {type(value).__name__}"
