"""The control API, on the loopback interface: health, status, arms and SQL."""

from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from autopoiesis.telemetry.endpoint import sql_routes
from autopoiesis.telemetry.store import Store

Status = Callable[[], dict[str, Any]]


def control_app(store: Store, status: Status) -> web.Application:
    """Build the application: GET /health, GET /status, POST /sql."""
    app = web.Application()

    async def health(_request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def tell_status(_request: web.Request) -> web.Response:
        return _json(status())

    app.router.add_get("/health", health)
    app.router.add_get("/status", tell_status)
    app.add_routes(sql_routes(store))
    return app


def _json(value: object) -> web.Response:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return web.Response(body=body, content_type="application/json")
