"""A simulated vLLM replica: a real HTTP server whose timing is the twin's engine run in real time.

`python -m autopoiesis.replicas.simulated --port P --profile NAME --name N`
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys

import uvloop
from aiohttp import web

from autopoiesis.replicas.limits import Limits, with_limits
from autopoiesis.replicas.vllm_server import Replica
from autopoiesis.twin.latency import profile

log = logging.getLogger(__name__)

DEFAULT_MODEL = "simulated"
WRONG_USAGE, CANNOT_START = 2, 3


async def serve(
    replica: Replica, host: str, port: int, grace_s: float, stop: asyncio.Event
) -> None:
    """Serve until `stop`, then finish what runs for at most `grace_s`; OSError if the port is taken."""
    runner = web.AppRunner(
        replica.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    stepping = asyncio.create_task(replica.engine.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await web.TCPSite(runner, host, port).start()
        log.info("%s serves %s on %s:%d", replica.name, replica.model, host, port)
        await asyncio.wait({stepping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stepping.done():
            stepping.result()
        replica.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(replica.engine.wait_idle(), grace_s)
    finally:
        await runner.cleanup()
        stepping.cancel()
        stopping.cancel()
        await asyncio.gather(stepping, stopping, return_exceptions=True)


async def _serve_until_signal(replica: Replica, options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(replica, options.host, options.port, options.grace, stop)


def main() -> int:
    """Run one replica; the exit code is 0 when it was told to stop."""
    parser = argparse.ArgumentParser(prog="autopoiesis.replicas.simulated", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--profile", required=True, help="latency profile of the engine")
    parser.add_argument("--name", required=True)
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster than the profile")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model id to serve")
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers' lengths")
    parser.add_argument(
        "--max-num-seqs", type=int, default=0, help="requests in a step; 0: the profile's"
    )
    parser.add_argument("--max-num-batched-tokens", type=int, default=0, help="tokens in a step")
    parser.add_argument("--grace", type=float, default=20.0, help="longest drain after SIGTERM [s]")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not options.speed > 0.0:
        parser.error("--speed must be above 0")
    try:
        limits = Limits(options.max_num_seqs, options.max_num_batched_tokens)
        chosen = with_limits(profile(options.profile), limits)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG_USAGE
    replica = Replica(options.name, options.model, chosen, options.speed, options.seed)
    try:
        uvloop.run(_serve_until_signal(replica, options))
    except OSError as error:
        sys.stderr.write(
            f"{options.name} cannot listen on {options.host}:{options.port}: {error.strerror}\n"
        )
        return CANNOT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
