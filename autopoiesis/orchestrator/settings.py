"""What an operator can set. Flags override `AUTOPOIESIS_*` variables, which override the TOML file."""

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import SLOW_SEEDS
from autopoiesis.gateway.settings import DataPlaneSettings
from autopoiesis.orchestrator.loop import LoopSettings
from autopoiesis.orchestrator.plan_terms import PlanSettings
from autopoiesis.orchestrator.triggers import TriggerSettings
from autopoiesis.synthesis.llm.settings import LlmSettings
from autopoiesis.twin.latency import profile

ENVIRONMENT_PREFIX = "AUTOPOIESIS_"


class SettingsError(ValueError):
    """A setting is wrong; the message says which, and what to do."""


class Settings(BaseModel):
    """Everything that `serve` needs to know. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Path(".autopoiesis")
    """Telemetry, logs and run-time files live here."""
    host: str = "127.0.0.1"
    """Address the gateway listens on; 0.0.0.0 for all."""
    port: int = Field(8080, ge=1, le=65535)
    control_port: int = Field(8081, ge=1, le=65535)
    """Control API: health, status, arms, orders, SQL."""
    control_host: str = "127.0.0.1"
    """Address the control API listens on; beyond loopback every call needs the token."""
    control_token: str | None = Field(None, min_length=16, pattern=r"^[\x21-\x7e]+$")
    """Token of the control API; None: one is made. It lies in `<data_dir>/control-token`, for its owner only."""
    gateway: DataPlaneSettings = DataPlaneSettings()
    """TLS, keys and limits of the gateway; a table `[gateway]` in the TOML file."""
    models: dict[str, dict[str, Any]] = {}
    """Several models, each with a fleet and arms of its own: tables `[models.NAME]`, as `models.of_each` reads them."""
    replica: tuple[str, ...] = ()
    """URLs of OpenAI-compatible servers; `dns://HOST:PORT`: all addresses of that name; none: simulate."""
    fleet_file: Path | None = None
    """List of servers that somebody else keeps: lines of `URL [profile=NAME] [speed=X] [leaving]`."""
    discover_s: float = Field(2.0, ge=0.1)
    """How often names and the list are looked at again."""
    simulate: int = Field(4, ge=1, le=64)
    """How many replicas to simulate where neither a URL nor a model is given."""
    vllm: str | None = None
    """Model that vLLM serves on replicas started here: a name on the hub or a directory."""
    replicas: int = Field(1, ge=1, le=64)
    """How many vLLM replicas to start."""
    vllm_arguments: tuple[str, ...] = ()
    """Further arguments for each vLLM server."""
    vllm_python: str = sys.executable
    """Python interpreter that has vLLM installed."""
    vllm_start_s: float = Field(1800.0, gt=0.0)
    """Longest start of the vLLM replicas."""
    profile: tuple[str, ...] = ("h100-llama-3-8b-tp1-bf16",)
    """Latency profiles of the replicas, repeated over them in turn."""
    synthesizer: Literal["genetic", "openai", "fleet", "files", "none"] = "genetic"
    """Who writes new policies: a search, a model at `llm.base_url`, the fleet's own, or people."""
    llm: LlmSettings = LlmSettings.model_validate({})
    window_s: float = Field(10.0, ge=1.0, le=3600.0)
    cell_replicas: int = Field(2, ge=1)
    """Replicas in a cell, the unit to which an arm is assigned."""
    slo_ttft_s: float = Field(1.0, gt=0.0)
    slo_tpot_s: float = Field(0.1, gt=0.0)
    late_worth: float = Field(0.1, ge=0.0, le=1.0)
    """What an answer that only just misses an objective is worth beside one in time; less the later it comes."""
    target_utility: float = Field(0.95, gt=0.0, le=1.0)
    """Where even the best arm stays below this, new arms are asked for."""
    synthesis_budget_s: float | None = Field(None, gt=0.0)
    """Longest time one synthesis cycle may take; None: 20 s, and 120 s where models write."""
    synthesis_cooldown_s: float = Field(60.0, ge=0.0)
    """Shortest time between two synthesis cycles."""
    synthesis_prepare_s: float = Field(600.0, ge=0.0)
    """Time without a cycle after which one breeds policies for a surge; 0: never."""
    plan_control: Literal["off", "dry-run", "on"] = "off"
    """Whether slow policies may start and stop replicas: no, only say what they would, or yes."""
    slow_policy: str = "never"
    """Slow seed that plans for arms without a slow policy of their own."""
    minimum_replicas: int = Field(1, ge=1)
    """Fewest replicas that a plan may leave."""
    plan_max_changes: int = Field(4, ge=1)
    """Most replicas that may start or stop for one plan."""
    plan_at_once: int = Field(1, ge=1)
    """Replicas that are changed at the same time."""
    drain_s: float = Field(20.0, ge=0.0)
    """How long running requests may finish after a stop was asked for."""
    for_s: float | None = Field(None, gt=0.0)
    """Stop by itself after this time; None: serve until stopped."""
    otlp_traces: str | None = Field(None, pattern=r"^https?://[^/]+(/.*)?$")
    """Where a span per request goes: an OpenTelemetry collector's `http://127.0.0.1:4318/v1/traces`, say."""
    retention_hours: float = Field(168.0, ge=1.0)
    """How long requests and replica samples stay in the telemetry file; then they are in the history only."""
    window_retention_hours: float = Field(8784.0, ge=1.0)
    """The same of windows and all else: a year."""
    seed: int = Field(0, ge=0)

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            profile(name)
        if not names:
            raise ValueError("at least one profile is needed")
        return names

    @field_validator("slow_policy")
    @classmethod
    def _known_slow_policy(cls, name: str) -> str:
        if name not in SLOW_SEEDS:
            raise ValueError(f"there is no slow policy {name!r}; there are {', '.join(SLOW_SEEDS)}")
        return name

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.vllm and (self.replica or self.fleet_file):
            raise ValueError("vllm and replica or fleet_file are both given; give one of them")
        if self.plan_control == "on" and (self.replica or self.fleet_file):
            raise ValueError(
                "plan_control starts and stops replicas that run here only; set it to dry-run or off"
            )
        if self.port == self.control_port:
            raise ValueError(
                f"port and control_port are both {self.port}; give one of them another number"
            )
        return self

    def profile_of(self, place: int) -> str:
        """Return the profile of the replica at this place in the fleet."""
        return self.profile[place % len(self.profile)]

    @property
    def objective(self) -> Objective:
        """The service-level objective."""
        return Objective(self.slo_ttft_s, self.slo_tpot_s, self.late_worth)

    @property
    def cycle_budget_s(self) -> float:
        """Longest time one synthesis cycle may take [s]."""
        if self.synthesis_budget_s is not None:
            return self.synthesis_budget_s
        return 120.0 if self.synthesizer in {"openai", "fleet"} else 20.0

    @property
    def loop(self) -> LoopSettings:
        """How the window loop works."""
        return LoopSettings(
            cell_replicas=self.cell_replicas,
            triggers=TriggerSettings(
                target=self.target_utility,
                cooldown_s=self.synthesis_cooldown_s,
                prepare_s=self.synthesis_prepare_s,
            ),
        )

    @property
    def plans(self) -> PlanSettings:
        """How far plans may go."""
        return PlanSettings(
            self.plan_control,
            self.minimum_replicas,
            max_changes=self.plan_max_changes,
            at_once=self.plan_at_once,
        )

    @property
    def control_url(self) -> str:
        """Base URL at which this machine reaches the control API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.control_host, self.control_host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.control_port}"

    @property
    def run_dir(self) -> Path:
        """Where sockets and files of a running instance are."""
        return self.data_dir / "run"

    @property
    def telemetry_file(self) -> Path:
        """The DuckDB file."""
        return self.data_dir / "telemetry.duckdb"

    @property
    def history_dir(self) -> Path:
        """Where sealed hours lie as Parquet files."""
        return self.data_dir / "history"

    def save(self) -> None:
        """Write the settings where the child processes read them."""
        target = self.run_dir / "settings.json"
        told = self.model_dump(
            mode="json", exclude={"control_token"}
        )  # it lies in a file of its own
        target.write_bytes(orjson.dumps(told))

    @classmethod
    def of_running(cls, run_dir: Path) -> Self:
        """Read the settings that `serve` wrote for its children."""
        return cls.model_validate(orjson.loads((run_dir / "settings.json").read_bytes()))


_TABLES: dict[str, type[BaseModel]] = {"llm": LlmSettings, "gateway": DataPlaneSettings}
"""Settings that are tables of settings."""


def load_settings(
    config: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Settings:
    """Merge file, environment and flags (None: not given); raise `SettingsError` with one sentence."""
    values = _from_file(config) if config else {}
    given = _from_environment(os.environ if environment is None else environment, Settings)
    values = _over(given, values)
    values = _over({name: value for name, value in flags.items() if value is not None}, values)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        if first["type"] == "extra_forbidden":
            table = _TABLES.get(str(first["loc"][0])) if len(first["loc"]) > 1 else None
            known = ", ".join(sorted((table or Settings).model_fields))
            raise SettingsError(f"There is no setting {name!r}; known are: {known}.") from None
        what = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"Setting {name}: {what}." if name else f"{what}.") from None


def _over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others, tables name by name."""
    merged = {**lower, **upper}
    for name in _TABLES:
        if isinstance(lower.get(name), dict) and isinstance(upper.get(name), dict):
            merged[name] = {**lower[name], **upper[name]}
    return merged


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The configuration {path} is not valid TOML: {error}.") from None


def _from_environment(
    environment: Mapping[str, str], settings: type[BaseModel], prefix: str = ENVIRONMENT_PREFIX
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        variable = prefix + name.upper()
        if name in _TABLES and settings is Settings:
            if nested := _from_environment(environment, _TABLES[name], f"{variable}_"):
                values[name] = nested
        elif text := environment.get(variable):
            several = str(field.annotation).startswith("tuple")
            values[name] = tuple(part.strip() for part in text.split(",")) if several else text
    return values
