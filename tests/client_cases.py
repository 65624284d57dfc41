"""What an OpenAI client may ask of vLLM, case by case; each is asked of a server and of the gateway before it.

The list follows the topics of vLLM's own tests of its OpenAI server: chat, completions, streams and
their usage, logprobs, stop, choices, tools, structured outputs, responses, models, tokens, errors.
"""

import base64
from collections.abc import Callable
from typing import Any

import openai

Case = Callable[[openai.OpenAI, str], Any]
CASES: dict[str, Case] = {}
MESSAGES: list[Any] = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "Tell me of the sea."},
]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}},
    "required": ["name"],
    "additionalProperties": False,
}
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
VOLATILE = frozenset({"id", "created", "created_at", "system_fingerprint", "request_id"})
"""Fields that differ from one answer to the next."""


def case(asked: Case) -> Case:
    CASES[asked.__name__.removeprefix("_")] = asked
    return asked


def chat(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    given = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0.0} | fields
    return client.chat.completions.create(model=model, **given)


def complete(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    given = {"prompt": "the sea is", "max_tokens": 5, "temperature": 0.0} | fields
    return client.completions.create(model=model, **given)


def asks(name: str, way: Callable[..., Any], **fields: Any) -> None:
    CASES[name] = lambda client, model: way(client, model, **fields)


def posts(name: str, path: str, body: Any) -> None:
    """Send what the openai package knows no method for."""

    def ask(client: openai.OpenAI, model: str) -> Any:
        sent = {**body, "model": model} if isinstance(body, dict) else body
        base = str(client.base_url).rstrip("/").removesuffix("/v1")
        return client.post(f"{base}{path}", body=sent, cast_to=object)

    CASES[name] = ask


def gets(name: str, path: str) -> None:
    def ask(client: openai.OpenAI, _: str) -> Any:
        base = str(client.base_url).rstrip("/").removesuffix("/v1")
        return client.get(f"{base}{path}", cast_to=object)

    CASES[name] = ask


asks("chat", chat)
asks(
    "chat of several turns",
    chat,
    messages=[
        *MESSAGES,
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "More."},
    ],
)
asks(
    "chat with parts of text",
    chat,
    messages=[{"role": "user", "content": [{"type": "text", "text": "the sea"}]}],
)
asks("chat with a name", chat, messages=[{"role": "user", "name": "ann", "content": "the sea"}])
asks("chat with logprobs", chat, logprobs=True, top_logprobs=2)
asks("chat with no logprobs", chat, logprobs=False)
asks("chat with too many logprobs", chat, logprobs=True, top_logprobs=1000)
asks("chat with two choices", chat, n=2, temperature=1.0, seed=1)
asks("chat with a stop", chat, stop=["a", "e"])
asks("chat with a seed", chat, seed=7, temperature=0.7)
asks("chat with max_completion_tokens", chat, max_completion_tokens=3)
asks("chat with a bias", chat, logit_bias={"5": 1.0})
asks("chat with penalties", chat, presence_penalty=0.5, frequency_penalty=0.5)
asks("chat with a user and a store", chat, user="ann", store=False)
asks(
    "chat with vllm's sampling",
    chat,
    extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
)
asks("chat that ignores the end", chat, extra_body={"ignore_eos": True, "min_tokens": 5})
asks("chat with stop token ids", chat, extra_body={"stop_token_ids": [7]})
asks("chat with a priority", chat, extra_body={"priority": 0})
asks("chat that returns token ids", chat, extra_body={"return_token_ids": True})
asks(
    "chat that echoes",
    chat,
    extra_body={"echo": True, "add_generation_prompt": False, "continue_final_message": False},
)
asks("chat with json mode", chat, response_format={"type": "json_object"}, max_tokens=12)
asks(
    "chat with a schema",
    chat,
    max_tokens=24,
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
)
asks("chat with a choice", chat, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
asks("chat with a regex", chat, extra_body={"structured_outputs": {"regex": "[ab]{3}"}})
asks("chat with a wrong format", chat, response_format={"type": "poem"})
asks("chat with tools", chat, tools=[WEATHER], tool_choice="none")
asks(
    "chat with a named tool",
    chat,
    tools=[WEATHER],
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    max_tokens=24,
)
asks("chat with a required tool", chat, tools=[WEATHER], tool_choice="required", max_tokens=24)
asks(
    "chat with a tool's answer",
    chat,
    messages=[
        *MESSAGES,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ],
)
asks(
    "chat with an image it cannot see",
    chat,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
            ],
        }
    ],
)
asks("chat with an unknown role", chat, messages=[{"role": "parrot", "content": "the sea"}])
asks("chat without messages", chat, messages=[])
asks("chat too long", chat, messages=[{"role": "user", "content": "sea " * 5000}])
asks("chat with a negative limit", chat, max_tokens=-1)
asks("chat with a hot temperature", chat, temperature=99.0)
asks("chat of an unknown model", lambda client, _, **f: chat(client, "nothing", **f))
asks("a stream", chat, stream=True)
asks("a stream with usage", chat, stream=True, stream_options={"include_usage": True})
asks(
    "a stream with usage all along",
    chat,
    stream=True,
    stream_options={"include_usage": True, "continuous_usage_stats": True},
)
asks("a stream with logprobs", chat, stream=True, logprobs=True, top_logprobs=1)
asks("a stream of two choices", chat, stream=True, n=2, temperature=1.0, seed=1)
asks(
    "a stream of a tool",
    chat,
    stream=True,
    tools=[WEATHER],
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    max_tokens=24,
)
asks("a stream that is refused", chat, stream=True, max_tokens=-1)
asks("stream options without a stream", chat, stream_options={"include_usage": True})
asks("completion", complete)
asks("completion of an empty prompt", complete, prompt="")
asks("completion of tokens", complete, prompt=[5, 6, 7])
asks("completions of several prompts", complete, prompt=["the sea", "a ship"])
asks("completions of several token lists", complete, prompt=[[5, 6], [7, 8]])
asks("completion with logprobs", complete, logprobs=2)
asks("completion with an echo", complete, echo=True)
asks("completion with an echo and logprobs", complete, echo=True, logprobs=1)
asks("completion with two choices", complete, n=2, temperature=1.0, seed=1)
asks("completion with a stop", complete, stop=["a"])
asks("completion with a suffix", complete, suffix="end")
asks("completion with prompt logprobs", complete, extra_body={"prompt_logprobs": 1})
asks(
    "completion cut short", complete, prompt="sea " * 400, extra_body={"truncate_prompt_tokens": 4}
)
asks("completion of nothing at all", complete, max_tokens=0)
asks("completion too long", complete, prompt="sea " * 5000)
asks("completion with a wrong seed", complete, extra_body={"seed": "x"})
asks("a completion's stream", complete, stream=True)
asks(
    "a completion's stream with usage",
    complete,
    stream=True,
    stream_options={"include_usage": True},
)
asks("a stream of several prompts", complete, prompt=["the sea", "a ship"], stream=True)


@case
def models(client: openai.OpenAI, _: str) -> Any:
    return [model.model_dump() for model in client.models.list()]


@case
def responses(client: openai.OpenAI, model: str) -> Any:
    return client.responses.create(model=model, input="the sea", max_output_tokens=5, temperature=0)


@case
def a_response_as_a_stream(client: openai.OpenAI, model: str) -> Any:
    return client.responses.create(
        model=model, input="the sea", max_output_tokens=5, temperature=0, stream=True
    )


@case
def a_response_of_turns(client: openai.OpenAI, model: str) -> Any:
    turns: Any = [{"role": "user", "content": "the sea"}]
    return client.responses.create(
        model=model, input=turns, instructions="Be brief.", max_output_tokens=5, temperature=0
    )


@case
def embeddings(client: openai.OpenAI, model: str) -> Any:
    """A model that generates refuses this; who says so, and how, is the server's business."""
    return client.embeddings.create(model=model, input=["the sea"])


posts("tokens of a prompt", "/tokenize", {"prompt": "the sea"})
posts("tokens of a chat", "/tokenize", {"messages": MESSAGES})
posts("a prompt of tokens", "/detokenize", {"tokens": [5, 6, 7]})
posts("scores", "/score", {"text_1": "the sea", "text_2": "a ship"})
posts("a ranking", "/v1/rerank", {"query": "sea", "documents": ["the sea", "a ship"]})
gets("version", "/version")
gets("a response that is not there", "/v1/responses/resp_nothing")


def outcome(asked: Case, client: openai.OpenAI, model: str) -> Any:
    """Return what a client sees, without what differs each time."""
    try:
        return steady(plain(asked(client, model)))
    except openai.APIStatusError as error:
        return type(error).__name__, error.status_code, steady(error.body)
    except openai.APIError as error:
        return type(error).__name__, str(error)


def plain(answer: Any) -> Any:
    if isinstance(answer, openai.Stream):
        return [chunk.model_dump() for chunk in answer]
    return answer.model_dump() if isinstance(answer, openai.BaseModel) else answer


def steady(told: Any) -> Any:
    if isinstance(told, dict):
        return {
            name: steady(value)
            for name, value in told.items()
            if name not in VOLATILE and not name.endswith("_id")
        }
    return [steady(one) for one in told] if isinstance(told, list) else told


def shape(told: Any) -> Any:
    """Return the fields and kinds of an answer, whatever it says."""
    if isinstance(told, dict):
        return {name: shape(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        shapes = [shape(one) for one in told]
        return [one for i, one in enumerate(shapes) if one not in shapes[:i]]
    return type(told).__name__
