"""The process that speaks to language models for a synthesis worker, and to nobody else.

It alone has the key, and it may open TCP connections to the endpoint's port only; the worker that
races policies has neither key nor network. It reads its errand as JSON on stdin, then questions
from the socket whose number is its argument, and ends with the worker. Run it as `python -m
autopoiesis.synthesis.llm.clerk FD`.
"""

import asyncio
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from autopoiesis.synthesis.confine import confine, confine_network

DNS_PORT = 53


@dataclass(frozen=True, slots=True)
class Errand:
    """What a clerk is told when it starts. The key is not in it: it comes from the environment."""

    settings: dict[str, Any]
    """`LlmSettings`, as JSON."""
    folder: str
    """Where ledger, model records and exchanges are kept."""
    seed: int = 0
    control_url: str = ""
    """Of the instance whose fleet is asked; empty: the endpoint of the settings is asked."""
    fleet: dict[str, str] = field(default_factory=dict[str, str])
    """The fleet's replicas: base URL, without `/v1`, by name."""

    def to_bytes(self, brief: bytes, synthesizer: str) -> bytes:
        """Serialise, together with the brief that is to be recorded."""
        plain = {**asdict(self), "synthesizer": synthesizer}
        return orjson.dumps(plain) + b"\n" + brief


def main() -> int:
    """Run the clerk until its worker hangs up."""
    confine()
    first, _, brief = sys.stdin.buffer.read().partition(b"\n")
    plain: dict[str, Any] = orjson.loads(first)
    synthesizer = str(plain.pop("synthesizer"))
    errand = Errand(**plain)
    confine_network(_ports(errand))
    connection = socket.socket(fileno=int(sys.argv[1]))
    return asyncio.run(_serve(errand, connection, brief, synthesizer))


def _ports(errand: Errand) -> list[int]:
    """Return the TCP ports that are needed: of the endpoint or the fleet, of proxies, of name servers."""
    urls = [errand.control_url, *errand.fleet.values()] if errand.control_url else []
    if not urls:
        urls = [str(errand.settings["base_url"]), *urllib.request.getproxies().values()]
    return sorted({DNS_PORT, *(_port(url) for url in urls)})


def _port(url: str) -> int:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    return parts.port or (443 if parts.scheme == "https" else 80)


def key_of(settings: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Return the key from the variable that the settings name; empty if there is none."""
    name = str(settings.get("api_key_env") or "")
    return environment.get(name, "").strip() if name else ""


async def _serve(errand: Errand, connection: socket.socket, brief: bytes, synthesizer: str) -> int:
    # These take a second of CPU to import: at the lowest priority, and once the network is closed.
    from autopoiesis.synthesis.llm.choice import ModelChoice  # noqa: PLC0415
    from autopoiesis.synthesis.llm.conversation import Ask, Verdict  # noqa: PLC0415
    from autopoiesis.synthesis.llm.courier import LONGEST_LINE  # noqa: PLC0415
    from autopoiesis.synthesis.llm.exchange import Recorder, cycle_name  # noqa: PLC0415
    from autopoiesis.synthesis.llm.fleet import Fleet  # noqa: PLC0415
    from autopoiesis.synthesis.llm.ledger import Ledger  # noqa: PLC0415
    from autopoiesis.synthesis.llm.post import Models, Post  # noqa: PLC0415
    from autopoiesis.synthesis.llm.settings import LlmSettings  # noqa: PLC0415

    settings = LlmSettings.model_validate(errand.settings)
    folder, key = Path(errand.folder), key_of(errand.settings, os.environ)
    recorder = Recorder(folder / "exchanges", cycle_name(time.time()), settings.exchanges_mib << 20)
    recorder.begin(brief, synthesizer)
    choice = ModelChoice(folder / "models.json", settings)
    book = (
        Fleet(settings, key, errand.control_url, errand.fleet)
        if errand.control_url
        else Models(settings, key, choice)
    )
    post = Post(
        settings, book, Ledger(folder / "ledger.json", settings), choice, recorder, errand.seed
    )
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LONGEST_LINE)
    try:
        while line := await reader.readline():
            message: dict[str, Any] = orjson.loads(line)
            answer: dict[str, Any] = {}
            if message["kind"] == "ask":
                reply = await post.ask(Ask.of(message["ask"]), float(message["within_s"]))
                answer = {"reply": reply.as_dict()}
            elif message["kind"] == "judged":
                post.judged([Verdict(**verdict) for verdict in message["verdicts"]])
            elif message["kind"] == "end":
                recorder.add(message)
            writer.write(orjson.dumps(answer) + b"\n")
            await writer.drain()
    finally:
        writer.close()
        await book.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
