"""The bytes of an answer. A stream's are laid out once per request, so that a token costs one write."""

import asyncio
from typing import Any

import orjson

from autopoiesis.replicas.realtime import Sequence

WORDS = tuple(f" {word}".encode() for word in (
    "the", "sea", "was", "not", "yet", "lit", "and", "one", "man", "sat", "dry", "and", "hot", "far", "off", "air",
))  # fmt: skip
"""What the model says, over and over: each word is one token of `CHARS_PER_TOKEN` characters."""


def text_of(tokens: int) -> str:
    """Return that many tokens of text."""
    rounds, rest = divmod(tokens, len(WORDS))
    return (b"".join(WORDS) * rounds + b"".join(WORDS[:rest])).decode()


class Reply:
    """What all parts of one answer share."""

    def __init__(self, request_id: str, created: int, model: str, chat: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"
        self.created = created
        self.model = model
        self.chat = chat

    def whole(self, choices: list[Sequence], usage: dict[str, Any]) -> bytes:
        """Return the answer in one piece."""
        kind = "chat.completion" if self.chat else "text_completion"
        return orjson.dumps(
            self._object(kind, [self._choice(i, s) for i, s in enumerate(choices)])
            | {"usage": usage}
        )

    def event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """Return one server-sent event."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return b"data: " + orjson.dumps(self._object(kind, choices) | more) + b"\n\n"

    def choice(
        self, index: int, text: str, reason: str | None, role: bool = False
    ) -> dict[str, Any]:
        """Return one choice of a streamed part."""
        if not self.chat:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        delta = {"role": "assistant", "content": text} if role else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _choice(self, index: int, sequence: Sequence) -> dict[str, Any]:
        text = text_of(sequence.output_tokens)
        rest: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": sequence.reason}
        if self.chat:
            return rest | {"message": {"role": "assistant", "content": text}}
        return rest | {"text": text}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class TokenStream:
    """One choice of a streamed answer: writes its tokens straight to the connection."""

    __slots__ = ("_before", "_between", "_chunked", "_count", "_last", "_role", "_transport")

    def __init__(
        self,
        reply: Reply,
        index: int,
        reason: str,
        transport: asyncio.WriteTransport,
        chunked: bool,
    ) -> None:
        """Lay out the events; `chunked` says whether HTTP chunks go around them."""
        mark = WORDS[0].decode()
        each = reply.event([reply.choice(index, mark, None)])
        last = reply.event([reply.choice(index, mark, reason)])
        role = reply.event([reply.choice(index, "", None, role=True)]) if reply.chat else b""
        self._chunked = chunked
        self._before, self._between = _split(_framed(each, chunked))
        self._last = _split(_framed(last, chunked))
        self._role = _framed(role, chunked) if role else b""
        self._transport = transport
        self._count = 0

    def write(self, finished: bool) -> None:
        """Write the next token."""
        if self._transport.is_closing():
            return
        word = WORDS[self._count & 15]
        before, after = self._last if finished else (self._before, self._between)
        event = before + word + after
        self._transport.write(event if self._count else self._role + event)
        self._count += 1


def _framed(event: bytes, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event) if chunked else event


def _split(event: bytes) -> tuple[bytes, bytes]:
    before, _, after = event.rpartition(WORDS[0])
    return before, after
