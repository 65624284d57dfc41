"""Whatever comes in, nothing of ours answers 5xx, and the next request is served."""

import json
import random
import socket

import pytest
from stack import Stack, chat

BODIES: list[bytes] = [
    b"", b"{", b"}", b"null", b"true", b"1", b'"text"', b"[]", b"[{}]", b"\x00", b"\xff\xfe{}", b"\xef\xbb\xbf{}",
    b"{" * 5000, b"[" * 100_000, b'{"a":' * 2000, b'{"messages": []', b'{"messages": null}', b'{"messages": {}}',
    b'{"messages": [null]}', b'{"messages": [[]]}', b'{"messages": ["x"]}', b'{"messages": [{"content": 1}]}',
    b'{"messages": [{"content": [1, null, {"text": 7}, {"image_url": []}]}]}', b'{"messages": [{"role": []}]}',
    b'{"messages": [], "max_tokens": 1e999}', b'{"messages": [], "max_tokens": -1}', b'{"messages": [], "model": []}',
    b'{"messages": [], "max_tokens": 99999999999999999999999}', b'{"messages": [], "stream": "yes"}',
    b'{"messages": [], "priority": "high"}', b'{"messages": [], "priority": 1e308}', b'{"messages": [], "user": {}}',
    b'{"messages": [], "tools": [[[]]]}', b'{"messages": [{"content": "\\ud800"}]}', b'{"prompt": [[[[1]]]]}',
    b'{"prompt": [1, "a", null]}', b'{"prompt": {}}', b'{"input": [[1], "a", {"b": [null]}]}', b"a=b&c=d",
    b"--x\r\ncontent-disposition: form-data; name=file\r\n\r\nabc\r\n--x--\r\n", bytes(range(256)) * 16,
]  # fmt: skip
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
TYPES = ("application/json", "text/plain", "multipart/form-data; boundary=x", "", "\xe9")
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
RAW: list[bytes] = [
    b"\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"GET / HTTP/1.1\r\n\r\n",
    b"get /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET  /v1/models  HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /%00%ff/../..//v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\n: empty\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\na\x00b: c\r\n\r\n",
    HEAD + b"content-length: -1\r\n\r\n{}",
    HEAD + b"content-length: x\r\n\r\n{}",
    HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    HEAD + b"content-length: 99999999999999999999999999\r\n\r\n{}",
    HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: gzip\r\n\r\n{}",
    HEAD + b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
    HEAD + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
    HEAD + b"upgrade: websocket\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n{}",
    HEAD + b"content-length: 0\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_body_makes_the_gateway_fail(stack: Stack, path: str):
    for body in BODIES:
        for content_type in TYPES[:2]:
            answer = stack.request("POST", path, body, {"content-type": content_type})
            assert answer.status < 500, (body[:60], answer.body[:200])
            if answer.status == 400 and "x-served-by" not in answer.headers:
                assert answer.json["error"]["message"]
    assert stack.post(chat()).status == 200


def test_no_mutation_of_a_good_body_makes_it_fail(stack: Stack):
    rng = random.Random(7)
    good = json.dumps(
        chat("hello " * 40, max_tokens=3, tools=[{"a": 1}], user="u", priority=1, stream=False)
    ).encode()
    for _ in range(150):
        body = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(body))
            what = rng.randrange(4)
            if what == 0:
                body[at] = rng.randrange(256)
            elif what == 1:
                del body[at : at + rng.randint(1, 9)]
            elif what == 2:
                body[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 5)))
            else:
                body[at:at] = rng.choice((b"{", b"}", b"[", b"]", b'"', b",", b"null", b"1e999"))
        content_type = rng.choice(TYPES)
        headers = {"content-type": content_type} if content_type else {}
        answer = stack.request("POST", rng.choice(PATHS), bytes(body), headers)
        assert answer.status < 500, (bytes(body), answer.body[:200])
    assert stack.post(chat()).status == 200


@pytest.mark.parametrize("number", range(len(RAW)))
def test_nothing_that_is_hardly_http_makes_it_fail(stack: Stack, number: int):
    with socket.create_connection(("127.0.0.1", stack.port), timeout=5) as raw:
        try:
            raw.sendall(RAW[number])
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(65536)
        except OSError:
            answer = b""  # it hung up
    status = answer.split(b"\r\n", 1)[0]
    assert b" 50" not in status or b" 501 " in status  # a transfer encoding that nobody knows
    assert stack.request("GET", "/v1/models").status == 200
