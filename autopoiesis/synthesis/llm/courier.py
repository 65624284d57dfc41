"""Between the worker, which races policies and has neither network nor key, and the clerk, which has both.

One JSON message per line on a socket pair: the worker asks, the clerk replies; at the end the worker
tells how the cycle ended.
"""

import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import orjson

from autopoiesis.synthesis.llm.conversation import Ask, Fault, Reply, Verdict

LONGEST_LINE = 16 << 20
GRACE_S = 15.0
"""Time beyond a question's own that the clerk may take to say that it ran out; to start, above all."""
GOODBYE_S = 10.0


class Courier:
    """The worker's side: a correspondent that sends every question to the clerk."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._gone = ""

    def ask(self, ask: Ask, within_s: float) -> Reply:
        """Put a question to the clerk and wait for the reply."""
        if not self._gone:
            answer = self._exchange(
                {"kind": "ask", "ask": ask.as_dict(), "within_s": within_s},
                max(within_s, 0.0) + GRACE_S,
            )
            try:
                return Reply.of(answer["reply"])
            except (KeyError, TypeError, ValueError, AttributeError):
                self._gone = self._gone or "what the clerk says is not understood"
        return Reply(fault=Fault.GONE, reason=f"The models cannot be asked: {self._gone}.")

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """Tell how well answers did."""
        self._exchange({"kind": "judged", "verdicts": [asdict(v) for v in verdicts]}, GOODBYE_S)

    def ended(self, row: dict[str, Any], stops: Sequence[int]) -> None:
        """Tell how the cycle ended, for the record."""
        self._exchange({"kind": "end", "row": row, "stops": list(stops)}, GOODBYE_S)

    def _exchange(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if self._gone:
            return {}
        try:
            self._connection.settimeout(limit_s)
            self._connection.sendall(orjson.dumps(message) + b"\n")
            line = self._lines.readline(LONGEST_LINE)
            if not line:
                self._gone = "the process that speaks to them has ended"
            return orjson.loads(line) if line else {}
        except TimeoutError:
            self._gone = f"the process that speaks to them said nothing for {limit_s:.0f} s"
        except (OSError, orjson.JSONDecodeError) as error:
            self._gone = f"the way to the process that speaks to them broke ({error})"
        return {}
