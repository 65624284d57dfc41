"""Envoy's external processor, as our own Envoy is configured to ask it.

Per request one gRPC call: the body comes, the decision goes. Of a streamed answer the headers come
too, which have waited for the first token (`first_byte.py`); the tokens do not, but the call stays
open for as long as the stream, so that the picker can end one that has stalled.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from autopoiesis.gateway import protocol
from autopoiesis.gateway.access_log import STALLED
from autopoiesis.gateway.calls import Call
from autopoiesis.gateway.endpoint_picker import EndpointPicker, Question
from autopoiesis.gateway.errors import LOCAL_ERRORS, RETRY_AFTER_S, bad_request, overloaded
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.prompt import BadRequestError
from autopoiesis.gateway.protocol import GO_ON, Message
from autopoiesis.gateway.settings import LONGEST_HOLD_S, SESSION_HEADER, STALL_HEADER
from autopoiesis.gateway.state import Addresses

log = logging.getLogger(__name__)

WAIT = protocol.wait(LONGEST_HOLD_S)
_CONTENT_TYPE = "request.headers['content-type']"
_SESSION = f"request.headers['{SESSION_HEADER}']"


class Exchange:
    """One request's conversation with Envoy."""

    __slots__ = ("_call", "_flight", "_picker")

    def __init__(self, picker: EndpointPicker, call: Call) -> None:
        self._picker = picker
        self._call = call
        self._flight: Flight | None = None

    def received(self, message: bytes) -> None:
        """Answer a message."""
        told = protocol.read_request(message)
        kind = told.WhichOneof("request")
        if kind == "request_body" and self._flight is None:
            self._decide(told)
            return
        self._call.send(GO_ON[kind])
        if kind == "response_headers" and self._flight is not None:
            self._first_token(self._flight, protocol.attributes(told))

    def half_closed(self) -> None:
        """Envoy asks no more."""
        self.gone()
        self._call.end()

    def gone(self) -> None:
        """Envoy gave up waiting, or its client did."""
        if self._flight is not None:
            self._picker.give_up(self._flight)
            self._picker.ended(self._flight)

    # --- what the picker answers --------------------------------------------------------------

    def chosen(self, addresses: Addresses) -> None:
        """Send the decision; of an answer in one piece there is nothing more to see."""
        assert self._flight is not None
        patience_s = self._picker.patience_s(self._flight)
        self._call.send(protocol.choice(self._flight, addresses, patience_s))
        if not self._flight.stream:
            self._call.end()

    def shed(self, reason: str) -> None:
        """Refuse the request for now."""
        retry_after = {"retry-after": str(RETRY_AFTER_S)}
        self._call.send(protocol.refusal(429, overloaded(reason), retry_after))
        self._call.end()

    def stalled(self, for_s: float) -> bool:
        """End the stream if its replica may not be silent for so long."""
        limit_s = self._call.header(STALL_HEADER)
        if limit_s is None or for_s < float(limit_s):
            return False
        self._call.send(protocol.refusal(504, LOCAL_ERRORS[504], details=STALLED))
        self._call.end()
        return True

    # --- inside -------------------------------------------------------------------------------

    def _decide(self, message: Message) -> None:
        started_s = time.perf_counter()
        try:
            self._flight = self._picker.arrival(_question(message))
        except BadRequestError as error:
            self._call.send(protocol.refusal(400, bad_request(str(error), error.param)))
            self._call.end()
        except Exception:
            log.exception("A request could not be read")
            self._picker.state.faults.note("", "a request could not be read")
            self._call.send(GO_ON["request_body"])
            self._call.end()
        else:
            if not self._picker.decide(self._flight, self, started_s):
                self._call.send(WAIT)

    def _first_token(self, flight: Flight, attributes: Mapping[str, Any]) -> None:
        answered = "response.code" in attributes and attributes["response.code"].number_value < 400
        if answered:
            state = self._picker.state
            state.accounts.first_token(
                flight, state.membership.at_address(_text(attributes, "upstream.address"))
            )
            self._picker.began(flight, self)
        else:
            self._call.end()


def _question(message: Message) -> Question:
    attributes = protocol.attributes(message)
    return Question(
        path=_text(attributes, "request.path").partition("?")[0],
        request_id=_text(attributes, "request.id"),
        content_type=_text(attributes, _CONTENT_TYPE),
        session=_text(attributes, _SESSION),
        body=message.request_body.body,
    )


def _text(attributes: Mapping[str, Any], name: str) -> str:
    return attributes[name].string_value if name in attributes else ""
