"""The control API of a running instance, called from this machine."""

import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import orjson

from autopoiesis.telemetry.store import TelemetryError

TIMEOUT_S = 60.0


class RefusedError(ValueError):
    """The instance refuses what was asked: one sentence."""


def call(url: str, token: str, path: str, body: object = None) -> dict[str, Any]:
    """POST JSON to the control API at `url` (GET without a body) and return its answer. Path parts must be quoted.

    Raises:
        RefusedError: the call was wrong, or is not allowed.
        TelemetryError: no instance answers there, or it failed.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = None if body is None else orjson.dumps(body)
    post = urllib.request.Request(url + path, data, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(post, timeout=TIMEOUT_S) as response:  # noqa: S310
            return orjson.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            message = _message(error.read()) or f"{url} answered with HTTP status {error.code}."
        kind = RefusedError if error.code < 500 else TelemetryError
        raise kind(message) from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise TelemetryError(
            f"The instance at {url} did not answer ({error}); whether it did what was asked is not known. "
            "Look with `autopoiesis arms list`, then ask again."
        ) from None


def quoted(part: str) -> str:
    """Return text as one part of a path."""
    return urllib.parse.quote(part, safe="")


def _message(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
