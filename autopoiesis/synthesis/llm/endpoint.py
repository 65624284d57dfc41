"""One attempt at an OpenAI-compatible endpoint: sent once, read up to a limit, never trusted.

The endpoint may be slow, broken or hostile, so whatever it does becomes an `Attempt`. What it
does not know (a grammar, a priority, a temperature) is left out and it is asked again at once.
"""

import asyncio
import math
import time
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

import openai
import orjson

from autopoiesis.synthesis.llm.conversation import Ask, Fault

MOST_ANSWER_BYTES = 512 << 10
"""Of an HTTP response; no policy needs as much."""
LONGEST_MESSAGE = 1000
"""Characters of an endpoint's own words that are passed on."""
SHORTEST_SECRET = 8
"""A key shorter than this is none; blotting it out would garble answers."""

_DROPPED: dict[str, tuple[str, ...]] = {
    "structured_outputs": ("structured_output", "grammar", "guided", "ebnf"),
    "priority": ("priority",),
    "temperature": ("temperature",),
    "max_completion_tokens": ("max_completion_tokens",),
    "n": ("'n'", "`n`", '"n"', "n > 1", "multiple choices"),
}
"""Parameter that may be left out → words in a refusal by which it is meant."""
_TOO_LONG = (
    "context length",
    "context_length",
    "context window",
    "too long",
    "maximum model length",
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of sending a question once."""

    parameters: dict[str, Any]
    """What was sent besides the messages."""
    seconds: float
    status: int = 0
    """HTTP status, 0 if there was no response."""
    texts: tuple[str, ...] = ()
    cut: tuple[bool, ...] = ()
    prompt_tokens: int | None = None
    """As the endpoint counts them; None if it does not say."""
    answer_tokens: int | None = None
    fault: Fault | None = None
    reason: str = ""
    retry_after_s: float | None = None
    billable: bool = True
    """Whether it may cost something: False where the endpoint refused to work."""
    again: bool = False
    """Whether another attempt may go better."""


class Endpoint:
    """An endpoint with the parameters that it takes."""

    def __init__(self, base_url: str, key: str, timeout_s: float) -> None:
        """Prepare; nothing is sent. Without a key none is sent."""
        self.base_url = base_url
        self._key = key
        self._timeout_s = timeout_s
        self._dropped: set[str] = set()
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key or "none",
            max_retries=0,
            timeout=timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def close(self) -> None:
        """Hang up."""
        await self._client.close()

    async def models(self) -> list[dict[str, Any]]:
        """Return what `/v1/models` lists; empty if it lists nothing usable."""
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.models.with_streaming_response.list() as response,
            ):
                listed = orjson.loads(await _body(response))["data"]
                return [one for one in listed if isinstance(one.get("id"), str)]
        except Exception:
            return []

    async def attempt(self, ask: Ask, optional: dict[str, Any], within_s: float) -> Attempt:
        """Send a question; what the endpoint refuses of the `optional` parameters is left out."""
        while True:
            sent = {k: v for k, v in optional.items() if k not in self._dropped}
            if "max_completion_tokens" in self._dropped and "max_completion_tokens" in optional:
                sent["max_tokens"] = optional["max_completion_tokens"]
            attempt = await self._send(ask, sent, min(within_s, self._timeout_s))
            refused = _refused(attempt, sent)
            if refused is None:
                return attempt
            self._dropped.add(refused)

    async def _send(self, ask: Ask, sent: dict[str, Any], limit_s: float) -> Attempt:
        started_s = time.monotonic()
        attempt = Attempt({"model": ask.model, **sent}, 0.0)
        try:
            async with (
                asyncio.timeout(limit_s),
                self._client.chat.completions.with_streaming_response.create(
                    model=ask.model,
                    messages=[{"role": role, "content": text} for role, text in ask.messages],  # type: ignore[misc]
                    extra_body=sent,
                ) as response,
            ):
                attempt = _answered(
                    replace(attempt, status=response.status_code), self._blot(await _body(response))
                )
        except openai.APIStatusError as error:
            attempt = self._declined(attempt, error)
        except (TimeoutError, openai.APITimeoutError):
            reason = f"{self.base_url} gave no answer within {limit_s:.3g} s"
            attempt = replace(attempt, fault=Fault.TIME, reason=reason, again=True)
        except _TooMuch:
            reason = f"{self.base_url} sent more than {MOST_ANSWER_BYTES >> 10} KiB"
            attempt = replace(attempt, fault=Fault.NONSENSE, reason=reason)
        except Exception as error:
            what = f"{type(error).__name__}{f': {error.__cause__}' if error.__cause__ else ''}"
            reason = f"the connection to {self.base_url} failed ({self._said(what)})"
            attempt = replace(attempt, fault=Fault.BROKEN, reason=reason, again=True)
        return replace(attempt, seconds=time.monotonic() - started_s)

    def _declined(self, attempt: Attempt, error: openai.APIStatusError) -> Attempt:
        status, said = error.status_code, self._said(error.message)
        heading = f"{self.base_url} answered {status}: {said}"
        attempt = replace(attempt, status=status, reason=heading, billable=False)
        if status in {401, 403}:
            return replace(attempt, fault=Fault.KEY)
        if status == 429 and error.code == "insufficient_quota":
            return replace(attempt, fault=Fault.REFUSED)
        if status in {400, 413, 422} and any(words in said.lower() for words in _TOO_LONG):
            return replace(attempt, fault=Fault.TOO_LONG)
        wait_s = _retry_after_s(error.response.headers.get("retry-after"))
        if status in {429, 503}:
            return replace(attempt, fault=Fault.BUSY, again=True, retry_after_s=wait_s)
        if status >= 500 or status in {408, 409, 425}:
            return replace(attempt, fault=Fault.BROKEN, again=True, retry_after_s=wait_s)
        return replace(attempt, fault=Fault.REFUSED)

    def _blot(self, data: bytes) -> bytes:
        """Blot the key out of what the endpoint sends: it must not come to rest anywhere."""
        if len(self._key) < SHORTEST_SECRET:
            return data
        return data.replace(self._key.encode(), b"(key)")

    def _said(self, words: str) -> str:
        plain = self._blot(" ".join(words.split()).encode("utf-8", "replace")).decode(
            "utf-8", "replace"
        )
        return "".join(c if c.isprintable() else "?" for c in plain)[:LONGEST_MESSAGE]


class _TooMuch(Exception):  # noqa: N818 - a limit, not an error of ours
    """The response is longer than we read."""


async def _body(response: Any) -> bytes:
    data = bytearray()
    async for chunk in response.iter_bytes():
        data += chunk
        if len(data) > MOST_ANSWER_BYTES:
            raise _TooMuch
    return bytes(data)


def _answered(attempt: Attempt, data: bytes) -> Attempt:
    """Read a response of status 200."""
    try:
        plain = orjson.loads(data)
        choices: list[dict[str, Any]] = plain["choices"]
        texts = tuple(str(choice["message"].get("content") or "") for choice in choices)
        cut = tuple(choice.get("finish_reason") == "length" for choice in choices)
        usage = plain.get("usage") or {}
        prompt, answer = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = f"what came is no chat completion ({type(error).__name__})"
        return replace(attempt, fault=Fault.NONSENSE, reason=reason)
    attempt = replace(attempt, texts=texts, cut=cut, prompt_tokens=prompt, answer_tokens=answer)
    if not any(text.strip() for text in texts):
        return replace(attempt, fault=Fault.NONSENSE, reason="the answer is empty")
    return attempt


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _refused(attempt: Attempt, sent: dict[str, Any]) -> str | None:
    """Return the parameter because of which the endpoint refuses the question, None if of none."""
    if attempt.fault is not Fault.REFUSED or attempt.status not in {400, 404, 422, 501}:
        return None
    said = attempt.reason.lower()
    return next(
        (
            name
            for name, words in _DROPPED.items()
            if name in sent and any(w in said for w in words)
        ),
        None,
    )


def _retry_after_s(header: str | None) -> float | None:
    """Return how long to wait: `Retry-After` is a number of seconds or a date."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
