"""The endpoint picker of somebody else's gateway: Kubernetes' Gateway API Inference Extension.

Per request one ext_proc call. Headers and body come, in full duplex or buffered; the answer names
replicas in a header and in metadata. Then the answer passes by, and tells how the request went:
there is no access log of that gateway here. Protocol: proposal 004 of the extension, version 1.0.
"""

import logging
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from autopoiesis.gateway import inference_protocol, protocol
from autopoiesis.gateway.access_log import CLIENT_CLOSED, Ending
from autopoiesis.gateway.calls import Call
from autopoiesis.gateway.endpoint_picker import EndpointPicker, Question
from autopoiesis.gateway.errors import LOCAL_ERRORS, RETRY_AFTER_S, bad_request, overloaded
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.inference_protocol import BodyMode
from autopoiesis.gateway.prompt import BadRequestError
from autopoiesis.gateway.protocol import Message
from autopoiesis.gateway.settings import SESSION_HEADER
from autopoiesis.gateway.state import Addresses
from autopoiesis.telemetry.records import Status

log = logging.getLogger(__name__)

TAIL_BYTES = 4096
"""Of an answer, kept for the token counts, which stand at its end."""
_INPUT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_OUTPUT = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d+)')


class InferenceExchange:
    """One request's conversation with a gateway that speaks the protocol."""

    def __init__(self, picker: EndpointPicker, call: Call) -> None:
        self._picker = picker
        self._call = call
        self._flight: Flight | None = None
        self._headers: Mapping[str, str] = {}
        self._subset: frozenset[str] | None = None
        self._mode = self._answer_mode = BodyMode.BUFFERED
        self._body = bytearray()
        self._started_s = time.perf_counter()
        self._status = 0
        self._served = ""
        self._answer_bytes = 0
        self._tail = b""

    # --- what the gateway says ----------------------------------------------------------------

    def received(self, message: bytes) -> None:
        """Answer a message."""
        told = protocol.read_request(message)
        kind = told.WhichOneof("request")
        if kind == "request_headers":
            self._request_headers(told)
        elif kind == "request_body":
            self._request_body(told.request_body)
        elif kind == "request_trailers":
            if self._flight is None:
                self._decide()
            self._call.send(protocol.GO_ON[kind])
        elif kind == "response_headers":
            self._response_headers(told)
        elif kind == "response_body":
            self._response_body(told.response_body)
        else:
            self._end()
            self._call.send(protocol.GO_ON[kind])

    def half_closed(self) -> None:
        """The gateway says no more."""
        self.gone()
        self._call.end()

    def gone(self) -> None:
        """The gateway gave up, or its client did."""
        if self._flight is not None and not self._picker.give_up(self._flight):
            self._close(self._flight, Status.ABORTED, self._status or CLIENT_CLOSED)

    # --- what the picker answers --------------------------------------------------------------

    def chosen(self, addresses: Addresses) -> None:
        """Send the decision, and in full duplex the body back."""
        if not addresses:
            self._unavailable()
            return
        destination = inference_protocol.destination(addresses, self._mode)
        self._call.send(destination)
        if self._mode is BodyMode.FULL_DUPLEX and self._body:
            for chunk in inference_protocol.body_back(bytes(self._body)):
                self._call.send(chunk)
        self._body.clear()

    def shed(self, reason: str) -> None:
        """Refuse the request for now."""
        retry_after = {"retry-after": str(RETRY_AFTER_S)}
        self._refuse(HTTPStatus.TOO_MANY_REQUESTS, overloaded(reason), retry_after)

    # --- the request --------------------------------------------------------------------------

    def _request_headers(self, told: Message) -> None:
        self._headers = inference_protocol.headers(told.request_headers)
        self._subset = inference_protocol.subset(told)
        self._mode = inference_protocol.request_mode(told)
        self._answer_mode = inference_protocol.answer_mode(told)
        if told.request_headers.end_of_stream or self._mode is BodyMode.NONE:
            self._mode = BodyMode.NONE
            self._decide()
        elif self._mode is BodyMode.BUFFERED:
            self._call.send(protocol.GO_ON["request_headers"])

    def _request_body(self, body: Message) -> None:
        if self._flight is not None:
            return
        self._body += body.body
        if body.end_of_stream:
            self._decide()

    def _decide(self) -> None:
        try:
            self._flight = self._picker.arrival(self._question(), self._subset)
        except BadRequestError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, bad_request(str(error), error.param))
            return
        self._picker.decide(self._flight, self, self._started_s)

    def _question(self) -> Question:
        def header(name: str) -> str:
            return self._headers.get(name, "")

        return Question(
            path=header(":path").partition("?")[0],
            request_id=header("x-request-id"),
            content_type=header("content-type") if self._body else "",
            session=header(SESSION_HEADER),
            body=bytes(self._body),
        )

    def _unavailable(self) -> None:
        assert self._flight is not None
        status = HTTPStatus.SERVICE_UNAVAILABLE
        self._picker.ledger.retract(self._flight)
        self._picker.ledger.settle(self._flight, Status.FAILED, status)
        self._flight = None
        self._refuse(status, LOCAL_ERRORS[status])

    def _refuse(
        self, status: HTTPStatus, body: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        self._call.send(protocol.refusal(status, body, headers))
        self._call.end()

    # --- its answer ---------------------------------------------------------------------------

    def _response_headers(self, told: Message) -> None:
        headers = inference_protocol.headers(told.response_headers)
        status = headers.get(":status", "")
        self._status = int(status) if status.isdecimal() else 0
        self._served = inference_protocol.served(told)
        self._call.send(protocol.GO_ON["response_headers"])
        if told.response_headers.end_of_stream:
            self._end()

    def _response_body(self, body: Message) -> None:
        if self._flight is not None:
            if body.body and not self._answer_bytes and self._flight.stream and self._status < 400:
                state = self._picker.state
                replica = state.membership.at_address(self._served)
                state.accounts.first_token(self._flight, replica)
            self._answer_bytes += len(body.body)
            self._tail = (self._tail + body.body)[-TAIL_BYTES:]
        if self._answer_mode is BodyMode.FULL_DUPLEX:
            for chunk in inference_protocol.answer_on(body):
                self._call.send(chunk)
        else:
            self._call.send(protocol.GO_ON["response_body"])
        if body.end_of_stream:
            self._end()

    def _end(self) -> None:
        if self._flight is None:
            return
        status = Status.COMPLETED
        if self._status >= 500:
            status = Status.FAILED
        elif self._status >= 400:
            status = Status.REJECTED
        self._close(self._flight, status, self._status)

    def _close(self, flight: Flight, status: Status, http_status: int) -> None:
        """Tell the ledger, once."""
        self._flight = None
        now_s = self._picker.state.clock()
        self._picker.ledger.close(
            Ending(
                key=flight.key,
                arm_id=flight.arm_id,
                window=flight.window,
                shard=flight.shard,
                request_id=flight.request_id,
                path=flight.path,
                status=status,
                http_status=http_status,
                address=self._served,
                attempts=1,
                started_unix_s=flight.arrived_unix_s,
                ended_s=now_s - flight.arrived_s,
                body_bytes=self._answer_bytes,
                input_tokens=_last(_INPUT, self._tail),
                output_tokens=_last(_OUTPUT, self._tail),
            )
        )
        self._picker.release()


def _last(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None
