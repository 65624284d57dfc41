"""What calls of the control API may send."""

from pydantic import BaseModel, ConfigDict, Field

from autopoiesis.arms.arm import Origin
from autopoiesis.telemetry.endpoint import MOST_ROWS
from autopoiesis.telemetry.query import MAX_CHARACTERS, MAX_ROWS
from autopoiesis.telemetry.records import SynthesisRow

ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
LONGEST_SOURCE = 65_536
"""Characters of a policy that are looked at; the language itself allows far less."""


LONGEST_EXCHANGE = 100_000
"""Characters of a question to a language model, and of its answer."""


class Body(BaseModel):
    """What a call may send."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SaidBody(Body):
    """Who gives an order, and why."""

    by: str = Field("", max_length=100, pattern=ONE_LINE, examples=["alice"])
    why: str = Field("", max_length=1000, pattern=ONE_LINE, examples=["slower since the upgrade"])


class NewArmBody(SaidBody):
    """A policy, and what is known of it."""

    source: str = Field(
        max_length=LONGEST_SOURCE,
        description="Its functions; slow ones may stand beside fast ones.",
        examples=[
            "def score(request, replica, fleet):\n    return replica.in_flight / replica.speed\n"
        ],
    )
    slow: str = Field(
        "", max_length=LONGEST_SOURCE, description="Its slow functions, if not in `source`."
    )
    name: str = Field("", max_length=100, pattern=ONE_LINE, examples=["mine"])
    origin: Origin = Origin.FILES
    created_at: float | None = Field(
        None, ge=0.0, le=1e11, description="Unix time [s]; now if absent."
    )
    parents: tuple[str, ...] = Field((), max_length=64, examples=[("0123456789ab",)])
    thought: str = Field("", max_length=LONGEST_SOURCE, description="What its author said of it.")
    reason: str = Field("", max_length=1000, pattern=ONE_LINE, examples=["read from mine.py"])
    prompt: str = Field("", max_length=LONGEST_EXCHANGE, description="What its author was asked.")
    answer: str = Field("", max_length=LONGEST_EXCHANGE, description="What its author answered.")
    canary: bool = Field(False, description="Give it traffic at once.")


class CycleBody(SaidBody):
    """A synthesis cycle that was run by hand, with the verdict on every candidate."""

    cycle: SynthesisRow = Field(
        examples=[
            {
                "started_s": 1.8e9,
                "window": 12,
                "trigger": "operator: asked by hand",
                "synthesizer": "genetic",
                "seconds": 20.0,
                "cpu_seconds": 19.0,
                "tokens": 0,
                "cost_usd": 0.0,
                "conclusion": "Nothing promoted.",
            }
        ]
    )


class OrderBody(SaidBody):
    """An order, by whom and why."""

    arm: str = Field(
        "", max_length=200, pattern=ONE_LINE, description="Whom to allocate everything to."
    )
    on: bool = Field(True, description="Whether a dry run or human-only begins (true) or ends.")


class FleetOrderBody(SaidBody):
    """What replicas are to do."""

    replicas: tuple[str, ...] = Field(
        (), max_length=256, description="Their names; none: all that the order fits."
    )
    max_num_seqs: int = Field(0, ge=0, description="For a restart; 0: as it is.")
    max_num_batched_tokens: int = Field(0, ge=0, description="For a restart; 0: as it is.")
    tensor_parallel: int = Field(0, ge=0, description="For a restart; 0: as it is.")


class QueryBody(BaseModel):
    """One SELECT."""

    query: str = Field(max_length=MAX_CHARACTERS, examples=["select * from arm_scores"])
    max_rows: int = Field(MAX_ROWS, ge=1, le=MOST_ROWS)
