"""The control API: health, status, arms, allocation, orders, SQL, metrics, and the live page.

What each route takes and answers stands in `control_contract`, who may call it in `control_access`.
Every error is JSON: `{"error": {"message", "type"}}`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import orjson
from aiohttp import web
from aiohttp.web import BaseRequest
from pydantic import BaseModel, ValidationError

from autopoiesis.arms.arm import Arm
from autopoiesis.arms.language import PolicyError
from autopoiesis.arms.registry import RegistryError, UnknownArmError
from autopoiesis.orchestrator.catalogue import list_arms, show_arm, show_guard_rails
from autopoiesis.orchestrator.control_access import Access
from autopoiesis.orchestrator.control_bodies import (
    CycleBody,
    FleetOrderBody,
    NewArmBody,
    OrderBody,
    SaidBody,
)
from autopoiesis.orchestrator.control_contract import ROUTES, Route
from autopoiesis.orchestrator.control_openapi import openapi
from autopoiesis.orchestrator.fleet_orders import FleetCommand, FleetOrder
from autopoiesis.orchestrator.governor import Command
from autopoiesis.orchestrator.metrics import Metrics
from autopoiesis.orchestrator.page_routes import Page
from autopoiesis.orchestrator.rails import Order, OrderError
from autopoiesis.orchestrator.registrar import NewArm, Said, Step
from autopoiesis.replicas.limits import Limits
from autopoiesis.synthesis.llm.fleet import Spare
from autopoiesis.telemetry.endpoint import sql_routes
from autopoiesis.telemetry.query import QueryError
from autopoiesis.telemetry.records import SynthesisRow
from autopoiesis.telemetry.store import Store, TelemetryError

log = logging.getLogger(__name__)

LARGEST_BODY = 512 * 1024
LARGEST_CYCLE = 32 * 1024 * 1024
"""Bytes of the account of a synthesis cycle: up to 2,000 candidates with their sources."""
REFUSED: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownArmError, 404, "not_found"),
    (RegistryError, 409, "registry_error"),
    (OrderError, 409, "order_error"),
    (PolicyError, 422, "policy_error"),
    (QueryError, 400, "query_error"),
    (TelemetryError, 503, "telemetry_error"),
)
"""What the rooms refuse: status and type of the error; the first that fits counts."""

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Desk(Protocol):
    """The controller, as far as the control API may ask and order."""

    def status(self) -> dict[str, Any]:
        """Return a picture of now."""
        ...

    def waiting_for(self) -> list[str]:
        """Return what is missing before requests are decided as they should be."""
        ...

    def allocation(self) -> dict[str, Any] | None:
        """Return who serves what now, None before the first allocation."""
        ...

    def spare(self) -> Spare:
        """Return whether the fleet has time to spare."""
        ...

    def fleet(self) -> list[dict[str, Any]]:
        """Return every replica with what it does and may do at once."""
        ...

    def order_of_fleet(self, command: FleetCommand, said: Said) -> tuple[str, ...]:
        """Take an order for replicas; return whom it is for."""
        ...

    async def add_arm(self, new: NewArm, said: Said) -> tuple[Arm, bool]:
        """Take a policy in; return the arm, and whether it is new."""
        ...

    async def change_arm(self, which: str, step: Step, said: Said) -> Arm:
        """Do one step to an arm."""
        ...

    async def obey(self, command: Command, said: Said) -> None:
        """Carry out an order."""
        ...

    async def keep_cycle(self, cycle: SynthesisRow, said: Said) -> int:
        """Write the account of a synthesis cycle by hand; return its number."""
        ...


class _Handlers:
    """What each route does, by the route's name."""

    def __init__(self, store: Store, desk: Desk, metrics: Metrics) -> None:
        self._store = store
        self._desk = desk
        self._metrics = metrics
        self._openapi = orjson.dumps(openapi(ROUTES))

    async def health(self, _request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def ready(self, _request: web.Request) -> web.Response:
        missing = self._desk.waiting_for()
        return _json({"ready": not missing, "waiting_for": missing}, 503 if missing else 200)

    async def openapi(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._openapi, content_type="application/json")

    async def status(self, _request: web.Request) -> web.Response:
        return _json(self._desk.status())

    async def allocation(self, _request: web.Request) -> web.Response:
        allocation = self._desk.allocation()
        if allocation is None:
            return _error(404, "not_found", "There is no allocation yet; GET /ready tells when.")
        return _json(allocation)

    async def spare(self, _request: web.Request) -> web.Response:
        return _json(asdict(self._desk.spare()))

    async def fleet(self, _request: web.Request) -> web.Response:
        return _json({"replicas": self._desk.fleet()})

    async def order_of_fleet(self, request: web.Request) -> web.Response:
        body = await _body(request, FleetOrderBody)
        limits = Limits(body.max_num_seqs, body.max_num_batched_tokens, body.tensor_parallel)
        order = FleetOrder(request.match_info["change"])
        command = FleetCommand(order, body.replicas, limits)
        names = self._desk.order_of_fleet(command, Said(body.by, body.why))
        return _json({"replicas": names})

    async def list_arms(self, _request: web.Request) -> web.Response:
        return _json({"arms": await asyncio.to_thread(list_arms, self._store.query)})

    async def show_arm(self, request: web.Request) -> web.Response:
        which = request.match_info["arm"]
        return _json(await asyncio.to_thread(show_arm, self._store.query, which))

    async def add_arm(self, request: web.Request) -> web.Response:
        body = await _body(request, NewArmBody)
        new = NewArm(**body.model_dump(exclude={"by", "why"}))
        arm, is_new = await self._desk.add_arm(new, Said(body.by, body.why))
        return _json(told(arm, new=is_new))

    async def change_arm(self, request: web.Request) -> web.Response:
        body = await _body(request, SaidBody)
        which, step = request.match_info["arm"], Step(request.match_info["step"])
        arm = await self._desk.change_arm(which, step, Said(body.by, body.why))
        return _json(told(arm, new=False))

    async def keep_cycle(self, request: web.Request) -> web.Response:
        body = await _body(request.clone(client_max_size=LARGEST_CYCLE), CycleBody)
        number = await self._desk.keep_cycle(body.cycle, Said(body.by, body.why))
        return _json({"synthesis": number})

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def guard_rails(self, _: web.Request) -> web.Response:
        return _json(await asyncio.to_thread(show_guard_rails, self._store.query))

    async def obey(self, request: web.Request) -> web.Response:
        body = await _body(request, OrderBody)
        command = Command(Order(request.match_info["order"]), body.arm, body.on)
        await self._desk.obey(command, Said(body.by, body.why))
        return await self.guard_rails(request)


def told(arm: Arm, *, new: bool) -> dict[str, Any]:
    """Return what is told of an arm after a change."""
    names = ("id", "name", "origin", "state", "pinned", "reason", "parents", "kind")
    return {name: getattr(arm, name) for name in names} | {"new": new}


def control_app(store: Store, desk: Desk, access: Access, metrics: Metrics) -> web.Application:
    """Build the application of the control API."""
    app = web.Application(middlewares=[_guard(access)], client_max_size=LARGEST_BODY)
    handlers, page = _Handlers(store, desk, metrics), Page(store, desk.status)
    (sql,) = sql_routes(store)
    elsewhere: dict[str, Any] = {
        "sql": sql.handler,  # type: ignore[union-attr]
        "page": page.page,
        "page_file": page.page_file,
        "live": page.live,
    }
    for route in ROUTES:
        handler: Handler = elsewhere.get(route.name) or getattr(handlers, route.name)
        app.router.add_route(route.method, _pattern(route), handler)
    app.on_shutdown.append(page.stop)
    return app


def _guard(access: Access) -> Any:
    """Turn away who may not call, and answer every error in JSON."""
    known = {(route.method.upper(), route.path): route for route in ROUTES}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        path = resource.canonical if resource else ""
        route = known.get((request.method, path))
        if not (route and route.probe):
            refusal = access.refusal(request, needs_token=bool(route and route.changes))
            if refusal:
                answer = _error(refusal.status, refusal.kind, refusal.message)
                if refusal.status == 401:
                    answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _in_json(request, error)
        except ValidationError as error:
            return _error(400, "invalid_request_error", _first_fault(error))
        except Exception as error:
            for kind, status, name in REFUSED:
                if isinstance(error, kind):
                    return _error(status, name, str(error))
            log.exception("The control API failed on %s %s", request.method, request.path)
            return _error(
                500, "server_error", "The control API failed; the controller's log says how."
            )

    return guard


def _in_json(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        answer = _error(
            405, "method_not_allowed", f"{request.path} takes {allowed}, not {request.method}."
        )
        answer.headers["Allow"] = allowed
        return answer
    if error.status == 404:
        told = f"There is nothing at {request.path}; GET /openapi.json describes what there is."
        return _error(404, "not_found", told)
    if error.status == 413:
        told = f"The body is larger than {LARGEST_BODY // 1024} KiB; send less."
        return _error(413, "body_too_large", told)
    return _error(error.status, "invalid_request_error", f"{error.reason}.")


async def _body(request: BaseRequest, model: type[B]) -> B:
    return model.model_validate_json(await request.read() or b"{}")


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{f'Field {where}' if where else 'The body'}: {fault['msg']}."


def _error(status: int, kind: str, message: str) -> web.Response:
    return _json({"error": {"message": message, "type": kind}}, status)


def _json(value: object, status: int = 200) -> web.Response:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return web.Response(body=body, status=status, content_type="application/json")


def _pattern(route: Route) -> str:
    path = route.path
    for name, pattern in route.parameters:
        path = path.replace(
            f"{{{name}}}", f"{{{name}:{pattern.removeprefix('^').removesuffix('$')}}}"
        )
    return path
