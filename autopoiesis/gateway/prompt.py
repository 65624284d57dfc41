"""What a request body says that matters for serving it: how long the prompt is, and how it begins."""

from dataclasses import dataclass
from typing import Any, cast

import orjson

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEFAULT_OUTPUT_TOKENS = {COMPLETIONS: 16}
"""What vLLM generates at most where the client gives no limit."""
UNLIMITED_OUTPUT_TOKENS = 4096
"""Taken as the limit where there is none but the model's context."""
MOST_OUTPUT_TOKENS = 1_000_000
MEDIA_TOKENS = 512
"""Prompt tokens taken for one image, sound or film."""
LIMIT_NAMES = ("max_completion_tokens", "max_tokens", "max_output_tokens")

Json = dict[str, Any]


class BadRequestError(ValueError):
    """The body is wrong; the message says what, `param` is the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's prompt and limits, as far as they can be told without a tokenizer."""

    model: str
    text: str
    """All text in the order in which a chat template renders it."""
    counted_tokens: int
    """Prompt tokens that are not text: token ids, media."""
    stream: bool
    max_output_tokens: int
    priority_class: float
    user: str


def read_prompt(path: str, content_type: str, body: bytes) -> Prompt:
    """Read a body; BadRequestError names what is wrong with it.

    Only what every replica would refuse is refused here; the rest is the replica's to judge.
    """
    strict = path in {CHAT, COMPLETIONS}
    if not strict and "json" not in content_type:
        return Prompt("", "", max(1, len(body) // 1024), False, UNLIMITED_OUTPUT_TOKENS, 0.0, "")
    fields = _object(body)
    collector = _Collector()
    if path == CHAT:
        _chat(fields, collector)
    elif path == COMPLETIONS:
        _completion(fields, collector)
    else:
        for name in ("instructions", "messages", "input", "prompt", "query", "documents"):
            collector.add_any(fields.get(name))
    return Prompt(
        model=_text(fields.get("model")),
        text="".join(collector.parts),
        counted_tokens=collector.tokens,
        stream=fields.get("stream") is True,
        max_output_tokens=_limit(fields, DEFAULT_OUTPUT_TOKENS.get(path, UNLIMITED_OUTPUT_TOKENS)),
        priority_class=_priority(fields.get("priority")),
        user=_text(fields.get("user")),
    )


class _Collector:
    """Gathers a prompt's text and counts what is no text."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.tokens = 0

    def add_any(self, value: object) -> None:
        """Add text, token ids, or lists and objects of them."""
        if isinstance(value, str):
            self.parts.append(value)
        elif isinstance(value, list):
            items = cast("list[object]", value)
            if items and isinstance(items[0], int):
                self.tokens += len(items)
            else:
                for item in items:
                    self.add_any(item)
        elif isinstance(value, dict):
            self.add_part(cast("Json", value))

    def add_part(self, part: Json) -> None:
        """Add one part of a message's content, or a whole message."""
        if isinstance(text := part.get("text"), str):
            self.parts.append(text)
        elif "content" in part:
            self.add_any(part["content"])
        elif any(kind in part for kind in ("image_url", "input_audio", "video_url", "audio_url")):
            self.tokens += MEDIA_TOKENS


def _object(body: bytes) -> Json:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise BadRequestError(f"The body must be a JSON object, not {_kind(value)}.")
    return cast("Json", value)


def _chat(fields: Json, collector: _Collector) -> None:
    messages = fields.get("messages")
    if messages is None:
        raise BadRequestError("The field 'messages' is missing.", "messages")
    if not isinstance(messages, list):
        raise BadRequestError(f"'messages' must be a list, not {_kind(messages)}.", "messages")
    if isinstance(tools := fields.get("tools"), list) and tools:
        collector.parts.append(orjson.dumps(tools).decode())
    for i, message in enumerate(cast("list[object]", messages)):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise BadRequestError(f"'{where}' must be an object, not {_kind(message)}.", where)
        fields_of = cast("Json", message)
        content = fields_of.get("content")
        if content is not None and not isinstance(content, str | list):
            param = f"{where}.content"
            raise BadRequestError(
                f"'{param}' must be a string or a list, not {_kind(content)}.", param
            )
        collector.parts.append(f"\n{_text(fields_of.get('role'))}\n")
        collector.add_any(content)


def _completion(fields: Json, collector: _Collector) -> None:
    prompt = fields.get("prompt")
    if prompt is None and fields.get("prompt_embeds") is None:
        raise BadRequestError("The field 'prompt' is missing.", "prompt")
    if prompt is not None and not isinstance(prompt, str | list):
        raise BadRequestError(
            f"'prompt' must be a string or a list, not {_kind(prompt)}.", "prompt"
        )
    collector.add_any(prompt)


def _limit(fields: Json, default: int) -> int:
    for name in LIMIT_NAMES:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return min(value, MOST_OUTPUT_TOKENS)
    return default


def _priority(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return min(max(float(value), -1e9), 1e9)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")
