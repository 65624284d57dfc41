from contextlib import suppress

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopoiesis.gateway.prompt import CHAT, COMPLETIONS, MEDIA_TOKENS, BadRequestError, read_prompt

JSON = "application/json"


def read(path: str, **fields: object):
    return read_prompt(path, JSON, orjson.dumps(fields))


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (CHAT, b"", "not valid JSON", None),
        (CHAT, b'{"messages": [', "not valid JSON", None),
        (CHAT, b"[1]", "JSON object, not a list", None),
        (CHAT, b"3", "JSON object, not a number", None),
        (CHAT, b"{}", "'messages' is missing", "messages"),
        (CHAT, b'{"messages": "hi"}', "'messages' must be a list, not a string", "messages"),
        (
            CHAT,
            b'{"messages": [{}, 5]}',
            r"'messages\[1\]' must be an object, not a number",
            "messages[1]",
        ),
        (
            CHAT,
            b'{"messages": [{"content": 5}]}',
            "must be a string or a list, not a number",
            "messages[0].content",
        ),
        (COMPLETIONS, b"{}", "'prompt' is missing", "prompt"),
        (
            COMPLETIONS,
            b'{"prompt": true}',
            "'prompt' must be a string or a list, not a boolean",
            "prompt",
        ),
        ("/v1/embeddings", b"{nope", "not valid JSON", None),
    ],
)
def test_a_wrong_body_is_refused_by_name(path: str, body: bytes, message: str, param: str | None):
    with pytest.raises(BadRequestError, match=message) as refused:
        read_prompt(path, JSON, body)
    assert refused.value.param == param


def test_a_chat_is_read():
    prompt = read(
        CHAT,
        model="m",
        stream=True,
        max_completion_tokens=7,
        max_tokens=9,
        priority=-3,
        user="me",
        messages=[
            {"role": "system", "content": "be kind"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {}},
                ],
            },
            {"role": "assistant", "content": None},
        ],
    )
    assert prompt.text.split() == ["system", "be", "kind", "user", "look", "assistant"]
    assert (prompt.stream, prompt.max_output_tokens, prompt.priority_class, prompt.user) == (
        True,
        7,
        -3.0,
        "me",
    )
    assert prompt.counted_tokens == MEDIA_TOKENS


def test_a_longer_conversation_begins_with_the_shorter_one():
    first = [{"role": "user", "content": "hello"}]
    longer = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "bye"}]
    assert read(CHAT, messages=longer).text.startswith(read(CHAT, messages=first).text)


def test_token_ids_are_counted():
    assert read(COMPLETIONS, prompt=[1, 2, 3]).counted_tokens == 3
    assert read(COMPLETIONS, prompt=[[1, 2, 3], [4]]).counted_tokens == 4
    assert read(COMPLETIONS, prompt="abc").max_output_tokens == 16


@pytest.mark.parametrize("value", [None, "9", True, -1, 0, 1.5, [], {}])
def test_a_strange_limit_is_left_to_the_replica(value: object):
    assert read(CHAT, messages=[], max_tokens=value, priority="high").max_output_tokens == 4096


def test_uploads_are_no_json():
    assert (
        read_prompt("/v1/audio/transcriptions", "multipart/form-data; boundary=x", b"--x\r\n").text
        == ""
    )


@given(st.binary(max_size=200))
def test_no_bytes_can_do_more_than_be_refused(body: bytes):
    with suppress(BadRequestError):
        assert read_prompt(CHAT, JSON, body).max_output_tokens >= 1


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    [
        "messages",
        "prompt",
        "content",
        "text",
        "tools",
        "max_tokens",
        "priority",
        "stream",
        "user",
        "model",
        "input",
    ]
)
objects = st.lists(st.dictionaries(names, anything, max_size=2), max_size=2)
bodies = st.dictionaries(names, anything | objects, max_size=5)


@settings(max_examples=60, deadline=None)
@given(bodies, st.sampled_from([CHAT, COMPLETIONS, "/v1/responses"]))
def test_no_object_can_do_more_than_be_refused(fields: dict[str, object], path: str):
    with suppress(BadRequestError):
        prompt = read(path, **fields)
        assert prompt.max_output_tokens >= 1
        assert prompt.counted_tokens >= 0
