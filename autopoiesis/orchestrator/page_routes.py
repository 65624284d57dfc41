"""The live page, served by the control port: its files, and a stream of what changes.

The page is plain HTML, CSS and ES modules, all of it in `page/`; nothing comes from elsewhere, and a
policy tells the browser so.
"""

import asyncio
import logging
from contextlib import suppress
from hashlib import sha256
from importlib.resources import files
from typing import Any

import orjson
from aiohttp import web

from autopoiesis.orchestrator.live import Picture, Sent, StatusOf
from autopoiesis.telemetry.query import QueryError
from autopoiesis.telemetry.store import Store, TelemetryError

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""Between two looks at what has changed."""
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Page:
    """What the page asks for: itself, the files it loads, and a stream that ends when the server does."""

    def __init__(self, store: Store, status: StatusOf) -> None:
        self._picture = Picture(store, status)
        self._contents = page_files()
        self._stopping = asyncio.Event()

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Answer `GET /`."""
        return _file(request, *self._contents["index.html"])

    async def page_file(self, request: web.Request) -> web.StreamResponse:
        """Answer `GET /page/{name}`."""
        found = self._contents.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        return _file(request, *found)

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Answer `GET /live`."""
        response = web.StreamResponse(headers={"Cache-Control": "no-store"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        sent = Sent()
        with suppress(ConnectionError):  # the page has gone
            while not self._stopping.is_set():
                await response.write(await _told(self._picture, sent))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), INTERVAL_S)
        return response

    async def stop(self, _app: web.Application) -> None:
        """End all streams."""
        self._stopping.set()


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return the page's files by name, each with its content type."""
    folder = files("autopoiesis.orchestrator") / "page"
    return {
        entry.name: (entry.read_bytes(), kind)
        for entry in folder.iterdir()
        if (kind := KINDS.get(entry.name[entry.name.rfind(".") :]))
    }


def _file(request: web.Request, body: bytes, kind: str) -> web.StreamResponse:
    tag = f'"{sha256(body).hexdigest()[:16]}"'
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)


async def _told(picture: Picture, sent: Sent) -> bytes:
    try:
        parts = await picture.changes(sent)
    except (TelemetryError, QueryError) as error:
        return _event("trouble", {"message": str(error)})
    return b"".join(_event(name, part) for name, part in parts.items())


def _event(name: str, value: Any) -> bytes:
    data = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)
