"""The control API as data: its routes, what they take, and what they answer."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autopoiesis.arms.arm import Kind, Origin, State
from autopoiesis.orchestrator.capacity import Standing
from autopoiesis.orchestrator.control_bodies import (
    CycleBody,
    FleetOrderBody,
    NewArmBody,
    OrderBody,
    QueryBody,
    SaidBody,
)
from autopoiesis.orchestrator.fleet_orders import FleetOrder
from autopoiesis.orchestrator.rails import Order
from autopoiesis.orchestrator.registrar import Step


class Answer(BaseModel):
    """What a call gets."""

    model_config = ConfigDict(extra="forbid")


class Problem(Answer):
    """What went wrong: one sentence, and what to do."""

    message: str = Field(
        examples=["There is no arm called 'x'; `autopoiesis arms list` shows them all."]
    )
    type: str = Field(examples=["not_found"])


class ErrorAnswer(Answer):
    """An error."""

    error: Problem


class HealthAnswer(Answer):
    """The process answers."""

    status: Literal["ok"]


class ReadyAnswer(Answer):
    """Whether the controller serves; `waiting_for` says what is missing."""

    ready: bool
    waiting_for: list[str] = Field(examples=[["the picker"]])


class StatusAnswer(BaseModel):
    """A picture of now: recent windows, arms, traffic, events. More keys may join."""

    window: int | None
    window_s: float
    allocation: str
    arms: list[dict[str, Any]]
    events: list[dict[str, Any]]


class ArmAnswer(Answer):
    """One arm in a list."""

    id: str
    name: str
    origin: Origin
    state: State
    parents: list[str]
    created_at: str
    traffic_share: float
    utility: float | None
    reason: str
    kind: Kind = Field(description="Whether it has fast functions, slow ones, or both.")


class ArmsAnswer(Answer):
    """All arms, those with the most traffic first."""

    arms: list[ArmAnswer]


class StepAnswer(Answer):
    """One step in the life of an arm."""

    at: str | None
    state: State
    pinned: bool
    reason: str


class RaceAnswer(Answer):
    """How an arm did when it was raced; gains are over the best incumbent."""

    synthesis: int
    at: str | None
    trigger: str | None
    synthesizer: str | None
    verdict: str
    gate: str
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    reason: str


class ArmDetailAnswer(ArmAnswer):
    """All that is known of an arm."""

    pinned: bool
    posterior_mean: float | None
    posterior_sd: float | None
    windows: int
    requests: int
    thought: str
    source: str = Field(description="Its fast functions, empty for none.")
    slow: str = Field(description="Its slow functions, empty for none.")
    prompt: str = Field(description="What a language model was asked, empty if none wrote it.")
    answer: str = Field(description="What the model answered.")
    history: list[StepAnswer]
    races: list[RaceAnswer]


class ChangedArmAnswer(Answer):
    """An arm after a change."""

    id: str
    name: str
    origin: Origin
    state: State
    pinned: bool
    reason: str
    parents: list[str]
    kind: Kind
    new: bool = Field(description="Whether it was not in the registry before.")


class CycleAnswer(Answer):
    """A cycle that was written to the telemetry."""

    synthesis: int = Field(description="Its number there.")


class GuardRailsAnswer(Answer):
    """What an operator has ordered and is in force."""

    frozen: bool
    dry_run: bool
    human_only: bool
    only: str | None = Field(description="Id of the arm that has everything.")
    held_window: int | None = Field(description="Window of the allocation that stays.")
    in_force: str = Field(description="All that in words.")
    reason: str = Field(description="Who ordered it, and why.")
    since: str | None


class ReplicaAnswer(Answer):
    """A replica: what it does now, and may do at once."""

    replica: str
    standing: str = Field(
        description=f"{', '.join(Standing)}, or asleep.", examples=["ready", "draining"]
    )
    kind: Literal["simulated", "remote", "vllm"]
    address: str
    max_num_seqs: int
    max_num_batched_tokens: int
    ordered: str = Field(description="What it is still to do; empty for nothing.")
    error: str = Field(description="Why its last change failed and was taken back; empty if not.")


class FleetAnswer(Answer):
    """All replicas."""

    replicas: list[ReplicaAnswer]


class FleetOrderAnswer(Answer):
    """Whom an order is for, in the order of their turns."""

    replicas: list[str]


class CellAnswer(Answer):
    """A group of replicas with its arm."""

    arm_id: str
    name: str
    replicas: list[str]
    shards: list[int]
    share: float
    propensity: float


class AllocationAnswer(Answer):
    """Who serves what now, and why."""

    window: int
    why: str
    cells: list[CellAnswer]


class SpareAnswer(Answer):
    """Whether the fleet has time to write policies, and which replica has most of it."""

    idle: bool
    why: str = Field(examples=["3 requests are held"])
    replica: str = Field(description="Name of the idlest replica; empty if there is no time.")


class RowsAnswer(Answer):
    """The answer of a query."""

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    truncated: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Route:
    """One route of the control API."""

    method: Literal["get", "post"]
    path: str
    name: str
    summary: str
    answer: type[BaseModel] | None
    """None: a JSON object that is described nowhere, or no JSON at all."""
    body: type[BaseModel] | None = None
    changes: bool = False
    """It changes something: the token is needed."""
    probe: bool = False
    """It tells nothing worth a token: open wherever the API listens."""
    parameters: tuple[tuple[str, str], ...] = ()
    """Names in the path, each with what it may be: a pattern."""
    media: str = "application/json"
    """Content type of the answer."""
    also: int | None = None
    """A status beside 200 with which the same answer comes."""


_ARM = ("arm", r"^[^/]+$")
STEPS = "|".join(Step)
ORDERS = "|".join(Order)
FLEET_ORDERS = "|".join(FleetOrder)

ROUTES = (
    Route("get", "/health", "health", "Does the process answer?", HealthAnswer, probe=True),
    Route("get", "/ready", "ready", "Is there an allocation, and a picker that serves by it?", ReadyAnswer, probe=True,
          also=503),
    Route("get", "/openapi.json", "openapi", "This description.", None),
    Route("get", "/status", "status", "A picture of now.", StatusAnswer),
    Route("get", "/allocation", "allocation", "Who serves what now, and why.", AllocationAnswer),
    Route("get", "/spare", "spare", "Has the fleet time to spare?", SpareAnswer, probe=True),
    Route("get", "/arms", "list_arms", "All arms.", ArmsAnswer),
    Route("post", "/arms", "add_arm", "Take a policy in.", ChangedArmAnswer, NewArmBody, changes=True),
    Route("get", "/arms/{arm}", "show_arm", "One arm, by id, beginning of an id, or name.", ArmDetailAnswer,
          parameters=(_ARM,)),
    Route("post", "/arms/{arm}/{step}", "change_arm", "Do one step to an arm.", ChangedArmAnswer, SaidBody,
          changes=True, parameters=(_ARM, ("step", f"^({STEPS})$"))),
    Route("post", "/syntheses", "keep_cycle", "Keep the account of a cycle by hand.", CycleAnswer, CycleBody,
          changes=True),
    Route("get", "/control", "guard_rails", "What an operator has ordered and is in force.", GuardRailsAnswer),
    Route("post", "/control/{order}", "obey", "Give an order.", GuardRailsAnswer, OrderBody, changes=True,
          parameters=(("order", f"^({ORDERS})$"),)),
    Route("get", "/fleet", "fleet", "All replicas: what they do, and may do at once.", FleetAnswer),
    Route("post", "/fleet/{change}", "order_of_fleet", "Stop, start, restart, put to sleep or wake replicas, one at a "
          "time.", FleetOrderAnswer, FleetOrderBody, changes=True, parameters=(("change", f"^({FLEET_ORDERS})$"),)),
    Route("post", "/sql", "sql", "Ask the telemetry with one SELECT.", RowsAnswer, QueryBody),
    Route("get", "/metrics", "metrics", "Metrics for Prometheus; OpenMetrics if asked for.", None, media="text/plain"),
    Route("get", "/", "page", "The live page.", None, probe=True, media="text/html"),
    Route("get", "/page/{name}", "page_file", "A file of the live page.", None, probe=True, media="*/*",
          parameters=(("name", r"^[^/]+$"),)),
    Route("get", "/live", "live", "What the live page shows, as server-sent events.", None, media="text/event-stream"),
)  # fmt: skip
