"""Errors as OpenAI clients expect them."""

from http import HTTPStatus
from typing import Any

INVALID_REQUEST = "invalid_request_error"
UNAVAILABLE = "server_error"
OVERLOADED = "rate_limit_error"
RETRY_AFTER_S = 1
"""What a client that was shed is asked to wait."""


def openai_error(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error answer."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None) -> dict[str, Any]:
    """Return the answer to a wrong body; `param` is the field."""
    return openai_error(message, INVALID_REQUEST, "bad_request", param)


def overloaded(reason: str) -> dict[str, Any]:
    """Return the answer to a request that is shed."""
    return openai_error(f"{reason}; try again in {RETRY_AFTER_S} s.", OVERLOADED, "overloaded")


LOCAL_ERRORS: dict[int, dict[str, Any]] = {
    HTTPStatus.UNAUTHORIZED: openai_error(
        "A valid API key is needed; send it as `Authorization: Bearer KEY`.",
        INVALID_REQUEST,
        "invalid_api_key",
    ),
    HTTPStatus.NOT_FOUND: openai_error(
        "There is nothing at this path and method; the OpenAI API is under /v1/, as in POST /v1/chat/completions.",
        INVALID_REQUEST,
        "not_found",
    ),
    HTTPStatus.REQUEST_TIMEOUT: openai_error(
        "The request was not received completely in time; send it again.",
        INVALID_REQUEST,
        "request_timeout",
    ),
    HTTPStatus.UPGRADE_REQUIRED: openai_error(
        "The gateway speaks HTTP/1.1 and HTTP/2; use one of them.",
        INVALID_REQUEST,
        "upgrade_required",
    ),
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: openai_error(
        "The request's headers are too large; send less of them.",
        INVALID_REQUEST,
        "headers_too_large",
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: openai_error(
        "The gateway could not pass the answer on; try again.", UNAVAILABLE, "gateway_error"
    ),
    HTTPStatus.BAD_GATEWAY: openai_error(
        "The replica's answer was not valid HTTP; try again.", UNAVAILABLE, "bad_answer"
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: openai_error(
        "No replica can take the request now; try again shortly.", UNAVAILABLE, "no_replica"
    ),
    HTTPStatus.GATEWAY_TIMEOUT: openai_error(
        "The replica did not answer in time; try again.", UNAVAILABLE, "replica_timeout"
    ),
}
"""What Envoy answers where the error is of its own making. 400 and 429 are the picker's."""


def body_too_large(limit_bytes: int) -> dict[str, Any]:
    """Return the answer to a body above the limit."""
    return openai_error(
        f"The request body is larger than {limit_bytes >> 20} MiB; send less.",
        INVALID_REQUEST,
        "body_too_large",
    )


MALFORMED_HTTP = openai_error("The request is not valid HTTP.", INVALID_REQUEST, "malformed_http")

TOO_MANY_REQUESTS = openai_error(
    "There were too many requests with this API key; try again after the seconds in retry-after.",
    OVERLOADED,
    "rate_limit_exceeded",
)
