"""SQL over HTTP: the owner of the telemetry file answers, anybody on the control port may ask."""

import asyncio
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from aiohttp import web

from autopoiesis.telemetry.database import TelemetryError
from autopoiesis.telemetry.query import MAX_ROWS, TIMEOUT_S, QueryError, QueryResult
from autopoiesis.telemetry.store import Store

AT_ONCE = 2
"""Queries run beside each other; more wait their turn."""
MOST_ROWS = 100_000
MOST_BYTES = 64 * 2**20
"""Of an answer."""


def sql_routes(store: Store, timeout_s: float = TIMEOUT_S) -> web.RouteTableDef:
    """Return the route `POST /sql`, to be added to an application."""
    routes = web.RouteTableDef()
    threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="sql")

    def answer(body: bytes) -> bytes:
        query, max_rows = _question(body)
        result = store.query(query, max_rows, timeout_s)
        encoded = orjson.dumps(result)
        if len(encoded) > MOST_BYTES:
            raise QueryError(
                f"The answer has {len(encoded) / 2**20:.0f} MiB, more than {MOST_BYTES / 2**20:.0f}; "
                "ask for fewer rows or columns."
            )
        return encoded

    @routes.post("/sql")
    async def sql(request: web.Request) -> web.Response:
        try:
            body = await request.read()
            encoded = await asyncio.get_running_loop().run_in_executor(threads, answer, body)
        except QueryError as error:
            return _refusal(400, str(error))
        except TelemetryError as error:
            return _refusal(503, str(error))
        return web.Response(body=encoded, content_type="application/json")

    return routes


def _question(body: bytes) -> tuple[str, int]:
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        asked = None
    if not isinstance(asked, dict) or not isinstance(asked.get("query"), str):
        raise QueryError('Send JSON like {"query": "select ...", "max_rows": 1000}.')
    max_rows = asked.get("max_rows", MAX_ROWS)
    if type(max_rows) is not int or not 1 <= max_rows <= MOST_ROWS:
        raise QueryError(f"max_rows must be a whole number from 1 to {MOST_ROWS}.")
    return asked["query"], max_rows


def _refusal(status: int, message: str) -> web.Response:
    body = orjson.dumps({"error": {"message": message, "type": "query_error"}})
    return web.Response(status=status, body=body, content_type="application/json")


def ask(
    url: str, query: str, max_rows: int = MAX_ROWS, timeout_s: float = 60.0, token: str = ""
) -> QueryResult:
    """Put a query to a running instance whose control port is at `url`; on loopback it needs no token.

    Raises:
        QueryError: the instance refused the query, or it was wrong or too costly.
        TelemetryError: no instance answers there.
    """
    body = orjson.dumps({"query": query, "max_rows": max_rows})
    post = urllib.request.Request(  # noqa: S310 - the control port's own address
        url.rstrip("/") + "/sql",
        body,
        {"Content-Type": "application/json"}
        | ({"Authorization": f"Bearer {token}"} if token else {}),
    )
    try:
        with urllib.request.urlopen(post, timeout=timeout_s) as response:  # noqa: S310
            answer: dict[str, Any] = orjson.loads(response.read())
            return QueryResult(
                columns=tuple(answer["columns"]),
                types=tuple(answer["types"]),
                rows=answer["rows"],
                truncated=answer["truncated"],
                seconds=answer["seconds"],
            )
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(url, error.code, error.read()) from error
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise TelemetryError(
            f"No instance answers queries at {url} ({error}); is `autopoiesis serve` running there?"
        ) from error


def _refused(url: str, status: int, body: bytes) -> QueryError | TelemetryError:
    try:
        message = str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return TelemetryError(f"{url} answered with HTTP status {status}; is it a control port?")
    return QueryError(message) if status == 400 else TelemetryError(message)
