"""What a completion request asks for: its body checked as vLLM checks it, and read into one value."""

from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from autopoiesis.arms.prefix import CHARS_PER_TOKEN, block_hashes

LEGACY_MAX_TOKENS = 16
"""What `/v1/completions` generates at most where the client gives no limit."""
MOST_CHOICES = 128
MOST_PROMPTS = 1024
LARGEST_NUMBER = 2**31 - 1

Json = dict[str, Any]


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, param: str | None = None, kind: str = "BadRequestError"
    ) -> None:
        message = message.encode("utf-8", "replace").decode()
        super().__init__(message)
        self.status = status
        self.body = orjson.dumps(
            {"error": {"message": message, "type": kind, "param": param, "code": status}}
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the engine sees it."""

    tokens: int
    blocks: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Generation:
    """One request: `n` choices for each prompt."""

    chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int | None
    """The client's limit, None for as long as the context lasts."""
    natural_tokens: int | None
    """Where the model would stop by itself; None leaves it to chance."""
    ignore_eos: bool
    seed: int | None
    priority: float
    stream: bool
    include_usage: bool


def prompt_of(text: str) -> Prompt:
    """Measure a prompt's text."""
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return Prompt(max(1, -(-size // CHARS_PER_TOKEN)), block_hashes(text))


def read_object(body: bytes) -> Json:
    """Parse a body that must be a JSON object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The request body must be a JSON object.")
    return cast("Json", value)


def read_generation(fields: Json, chat: bool, model: str) -> Generation:
    """Check the fields of a (chat) completion; `ApiError` names the field that is wrong."""
    require_model(fields, model)
    stream = _flag(fields, "stream")
    limit = _whole(fields, "max_tokens", None if chat else LEGACY_MAX_TOKENS, least=1)
    if chat:
        limit = _whole(fields, "max_completion_tokens", limit, least=1)
    for name, most in (("temperature", 2.0), ("top_p", 1.0)):
        _number(fields, name, most)
    return Generation(
        chat=chat,
        prompts=(prompt_of(chat_text(fields)),) if chat else _prompts(fields),
        n=_whole(fields, "n", 1, least=1, most=MOST_CHOICES) or 1,
        max_tokens=limit,
        natural_tokens=_natural_tokens(fields),
        ignore_eos=_flag(fields, "ignore_eos"),
        seed=_whole(fields, "seed", None, least=-(2**63), most=2**63 - 1),
        priority=float(_whole(fields, "priority", 0, least=-LARGEST_NUMBER) or 0),
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def require_model(fields: Json, model: str) -> None:
    """Refuse a request for another model."""
    asked = fields.get("model", model)
    if not isinstance(asked, str):
        _refuse("model", "must be a string")
    if asked != model:
        message = f"The model `{asked}` does not exist; this server has `{model}`."
        raise ApiError(404, message, "model", "NotFoundError")


def chat_text(fields: Json) -> str:
    """Return the text of all messages, one after the other."""
    messages = fields.get("messages")
    if messages is None:
        _refuse("messages", "is missing")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "must be a list of at least one message")
    parts: list[str] = []
    for i, message in enumerate(cast("list[Any]", messages)):
        if not isinstance(message, dict):
            _refuse(f"messages[{i}]", "must be an object")
        fields_of = cast("Json", message)
        if not isinstance(fields_of.get("role"), str):
            _refuse(f"messages[{i}].role", "must be a string")
        parts += _content(fields_of.get("content"), f"messages[{i}].content")
    return "".join(parts)


def _content(content: Any, where: str) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        _refuse(where, "must be a string or a list of parts")
    texts: list[str] = []
    for i, part in enumerate(cast("list[Any]", content)):
        text = cast("Json", part).get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            _refuse(f"{where}[{i}]", "must be a text part; this model takes text only")
        texts.append(text)
    return texts


def _prompts(fields: Json) -> tuple[Prompt, ...]:
    """Read `prompt`: a text, token ids, or a list of either."""
    value = fields.get("prompt")
    if value is None:
        _refuse("prompt", "is missing")
    if isinstance(value, str):
        return (prompt_of(value),)
    items = cast("list[Any]", value) if isinstance(value, list) else []
    if not items:
        _refuse("prompt", "must be a text, a list of token ids, or a list of these")
    if len(items) > MOST_PROMPTS and type(items[0]) is not int:
        _refuse("prompt", f"must be at most {MOST_PROMPTS} prompts at once")
    if type(items[0]) is int:
        return (_token_prompt(items),)
    return tuple(prompt_of(p) if isinstance(p, str) else _token_prompt(p) for p in items)


def _token_prompt(ids: Any) -> Prompt:
    if not isinstance(ids, list) or not ids:
        _refuse("prompt", "must be a text, a list of token ids, or a list of these")
    tokens = cast("list[Any]", ids)
    if any(type(token) is not int or not 0 <= token <= LARGEST_NUMBER for token in tokens):
        _refuse("prompt", "holds a token id that is not a whole number of at least 0")
    return prompt_of("".join(f"{token & 0xFFFF:04x}" for token in tokens))


def _natural_tokens(fields: Json) -> int | None:
    """Read `vllm_xargs.simulated_output_tokens`, by which a load generator replays lengths."""
    extra = fields.get("vllm_xargs")
    if extra is None:
        return None
    if not isinstance(extra, dict):
        _refuse("vllm_xargs", "must be an object")
    return _whole(
        cast("Json", extra), "simulated_output_tokens", None, least=1, within="vllm_xargs."
    )


def _include_usage(fields: Json, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        _refuse("stream_options", "must be an object")
    if not stream:
        _refuse("stream_options", "can only be given when `stream` is true")
    return _flag(cast("Json", options), "include_usage", "stream_options.")


def _flag(fields: Json, name: str, within: str = "") -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(within + name, "must be true or false")
    return bool(value)


def _whole(
    fields: Json,
    name: str,
    default: int | None,
    least: int,
    most: int = LARGEST_NUMBER,
    within: str = "",
) -> int | None:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        _refuse(within + name, f"must be a whole number from {least} to {most}")
    return value


def _number(fields: Json, name: str, most: float) -> None:
    value = fields.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= most:
        _refuse(name, f"must be a number from 0 to {most:g}")


def _refuse(param: str, problem: str) -> NoReturn:
    raise ApiError(400, f"`{param}` {problem}.", param)
