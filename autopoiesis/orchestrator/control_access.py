"""Who may use the control API.

On loopback anybody on this machine may read; changes need the token, which only the owner of the
data directory can read. Beyond loopback every call needs it, but for the two probes. A page from
elsewhere in somebody's browser may do nothing: its origin is not ours, and a name that an attacker
points at this machine is not a name of this machine.
"""

import hmac
import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from autopoiesis.atomic import write_atomically

TOKEN_FILE = "control-token"  # noqa: S105 - where it lies, not what it is
TOKEN_BYTES = 24


class NoTokenError(RuntimeError):
    """The token cannot be read."""


def write_token(data_dir: Path, token: str | None) -> None:
    """Put the token where its owner's programs find it; None keeps the one that is there, or makes one."""
    path = data_dir / TOKEN_FILE
    if token is None and path.exists():
        return
    secret = token or secrets.token_urlsafe(TOKEN_BYTES)
    write_atomically(path, secret.encode(), mode=0o600)


def read_token(data_dir: Path) -> str:
    """Return the token; raise `NoTokenError`."""
    path = data_dir / TOKEN_FILE
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NoTokenError(
            f"The control token {path} cannot be read ({error}); only who started `autopoiesis serve` may change it."
        ) from None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is turned away."""

    status: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Access:
    """Decides who may call."""

    host: str
    """Address that the control API listens on."""
    token: str

    def refusal(self, request: web.Request, *, needs_token: bool) -> Refusal | None:
        """Return why the call is turned away, None if it is not."""
        local = is_loopback(self.host)
        if local and not is_loopback(_hostname(request.host)):
            told = f"The control API answers to 127.0.0.1 and localhost, not to {request.host!r}."
            return Refusal(403, "forbidden", told)
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            told = f"Pages of {origin!r} may not use the control API."
            return Refusal(403, "forbidden", told)
        if (needs_token or not local) and not self._has_token(request):
            told = (
                f"This needs the header `Authorization: Bearer TOKEN`; the token lies in {TOKEN_FILE} "
                "in the data directory."
            )
            return Refusal(401, "unauthorized", told)
        return None

    def _has_token(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"), self.token.encode()
        )
        return scheme.lower() == "bearer" and same


def is_loopback(host: str) -> bool:
    """Tell whether an address or name means this machine and no other."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(host: str) -> str:
    """Return the name in a `Host` header."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
