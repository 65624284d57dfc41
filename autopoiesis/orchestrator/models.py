"""Several models behind one gateway: an instance for each, with data of its own, and one Envoy before all.

Nothing is shared but Envoy, so a model's arms, telemetry, plans and faults are its own, and every
command that takes `--data-dir` works on the model's directory below the common one.
"""

import asyncio
import re
import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import ValidationError

from autopoiesis.gateway import envoy
from autopoiesis.gateway.models import Fleet
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir
from autopoiesis.orchestrator.child import Child, told_of_exit
from autopoiesis.orchestrator.settings import Settings, SettingsError
from autopoiesis.orchestrator.startup import CannotStartError, check_port, until_up
from autopoiesis.orchestrator.supervisor import STOP_GRACE_S, Say, Supervisor, data_directory
from autopoiesis.replicas.fleet import Member

START_LIMIT_S = 60.0
"""Longest start of Envoy, once all models are up."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_COMMON = frozenset(
    ("data_dir", "host", "port", "gateway", "control_host", "control_token", "for_s", "models")
)
"""Settings that are the same for all models."""
_FLEETS = ("replica", "fleet_file", "vllm")


class Model(NamedTuple):
    """One model's instance."""

    name: str
    settings: Settings
    fleet: Fleet


def of_each(settings: Settings) -> tuple[Model, ...]:
    """Return the models that are set; SettingsError says what is wrong with a table.

    A table holds what is different for its model, first of all its fleet, and `names`: by what names
    requests ask for it, the table's own if it says nothing. The control ports are one after the other.
    """
    for name in _FLEETS:
        if getattr(settings, name):
            raise SettingsError(f"Setting {name}: with [models] it belongs into a model's table.")
    common = settings.model_dump(exclude={"models"})
    models = tuple(
        _model(name, dict(table), common, i) for i, (name, table) in enumerate(settings.models.items())
    )  # fmt: skip
    _distinct("name", [model for one in models for model in one.fleet.models])
    _distinct("control_port", [settings.port, *(one.settings.control_port for one in models)])
    return models


def _model(name: str, table: dict[str, Any], common: dict[str, Any], place: int) -> Model:
    where = f"models.{name}"
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"Setting {where}: a table's name is of up to 40 letters, digits, dots and dashes; "
            "give the model's own name with names."
        )
    names = _names(table.pop("names", [name]), where)
    if misplaced := sorted(_COMMON & table.keys()):
        raise SettingsError(f"Setting {where}.{misplaced[0]}: it is the same for all models.")
    directory = Path(common["data_dir"]) / name
    control_port = common["control_port"] + place
    try:
        settings = Settings.model_validate(
            {**common, "control_port": control_port, **table, "data_dir": directory}
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where, *(str(part) for part in first["loc"])])
        raise SettingsError(
            f"Setting {field}: {str(first['msg']).removeprefix('Value error, ')}."
        ) from None
    return Model(name, settings, Fleet(RunDir(settings.run_dir.resolve()), name, names))


def _names(given: object, where: str) -> tuple[str, ...]:
    found = cast("list[object]", given) if isinstance(given, list) else []
    names = tuple(name for name in found if isinstance(name, str) and name)
    if not names or len(names) < len(found):
        raise SettingsError(f"Setting {where}.names: give a list of model names.")
    return names


def _distinct(what: str, values: list[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise SettingsError(f"Setting models: the {what} {value} is given twice.")


@contextmanager
def data_directories(settings: Settings) -> Generator[None]:
    """Hold the data directories of all models; raise `CannotStartError` if one cannot be had."""
    with ExitStack() as held:
        held.enter_context(data_directory(settings))
        for model in of_each(settings):
            held.enter_context(data_directory(model.settings))
        yield


class Models:
    """One running gateway for several models: `start`, then `stop` in any case."""

    def __init__(self, settings: Settings, say: Say, detail: Say) -> None:
        """Prepare; `say` and `detail` as a Supervisor's, with the model's name before what it says."""
        self.settings = settings
        self.models = of_each(settings)
        self.supervisors = [
            Supervisor(
                model.settings,
                _named(model.name, say),
                _named(model.name, detail),
                has_envoy=False,
                simulated_model=model.fleet.models[0],
            )
            for model in self.models
        ]
        self._say, self._detail = say, detail
        self._run_dir = settings.run_dir.resolve()
        self._fleets = [model.fleet for model in self.models]
        self._envoy: Child | None = None

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients, without `/v1`."""
        return self.supervisors[0].url

    @property
    def members(self) -> tuple[Member, ...]:
        """The replicas of all models."""
        return tuple(member for one in self.supervisors for member in one.members)

    async def start(self) -> None:
        """Start all and return once the gateway answers; raises what a Supervisor does."""
        settings = self.settings
        check_port(settings.host, settings.port, "--port")
        where = (settings.host, settings.port)
        try:
            await asyncio.to_thread(envoy.validate, *where, settings.gateway, self._fleets)
        except envoy.EnvoyError as error:
            raise CannotStartError(str(error)) from None
        shutil.rmtree(self._run_dir, ignore_errors=True)
        self._run_dir.mkdir(parents=True)
        (settings.data_dir / "logs").mkdir(exist_ok=True)
        for one in self.supervisors:  # one after the other: the first compiles for all
            await one.start()
        argv = envoy.prepare_for(self._run_dir, *where, self._fleets, settings.gateway)
        log = settings.data_dir / "logs" / "envoy.log"
        self._envoy = Child("envoy", argv, log, on_exit=self._on_exit)
        await self._envoy.start()
        self._detail(f"started envoy (process {self._envoy.pid}, log {log})")
        await until_up({f"{self.url}/v1/models": self._envoy}, [self._envoy], START_LIMIT_S)

    async def stop(self) -> None:
        """Drain, then stop everything and remove the run directories."""
        if self._envoy:
            if self._envoy.pid is not None:
                await envoy.drain(self._run_dir, self.settings.drain_s)
            await self._envoy.stop(STOP_GRACE_S)
        await asyncio.gather(*(one.stop() for one in self.supervisors))
        shutil.rmtree(self._run_dir, ignore_errors=True)

    async def change_gateway(self, gateway: DataPlaneSettings) -> None:
        """Serve new requests by other settings of the gateway; EnvoyError tells why not."""
        where = (self._run_dir, self.settings.host, self.settings.port)
        await asyncio.to_thread(envoy.change, *where, gateway, self._fleets)
        self.settings = self.settings.model_copy(update={"gateway": gateway})

    def _on_exit(self, name: str, code: int) -> None:
        self._say(told_of_exit(name, code, self.settings.data_dir / "logs" / f"{name}.log"))


def _named(name: str, say: Say) -> Say:
    return lambda line: say(f"{name}: {line}")
