"""The picker alone, as one command: find its arm and its replicas, and serve."""

import asyncio
import logging
import ssl
from pathlib import Path

import uvloop

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.gateway.standalone import StandalonePicker, serve
from autopoiesis.gateway.warm import warm_up
from autopoiesis.orchestrator.first_fleet import remote_members
from autopoiesis.orchestrator.replay_command import find_arms
from autopoiesis.orchestrator.settings import Settings, SettingsError
from autopoiesis.orchestrator.startup import CannotStartError
from autopoiesis.orchestrator.supervisor import Say


def run_picker(
    settings: Settings,
    arm: str,
    host: str,
    port: int,
    certificate: tuple[Path | None, Path | None],
    say: Say,
) -> None:
    """Serve until stopped; raise SettingsError, RegistryError, PolicyError, ProbeError, CannotStartError."""
    if not settings.replica:
        raise SettingsError("The picker needs replicas; give each with --replica URL.")
    (chosen,) = find_arms(settings, [arm])
    tls = _tls(*certificate)
    members = asyncio.run(remote_members(settings))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    warm_up()
    picker = StandalonePicker((chosen.id, compile_policy(verify(chosen.source))), members, say)
    try:
        uvloop.run(serve(picker, host, port, tls))
    except OSError as error:
        raise CannotStartError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}; give another --port."
        ) from None


def _tls(certificate: Path | None, key: Path | None) -> tuple[bytes, bytes] | None:
    """Return the key and the certificate, once it is sure that they fit together."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise SettingsError("--tls-cert and --tls-key go together; give both or none.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        return key.read_bytes(), certificate.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"Cannot use the certificate {certificate}: {error}.") from None
