"""A trace's requests as bodies: made-up text of the recorded length, equal where prefixes were equal."""

import hashlib

import numpy as np
import orjson

from autopoiesis.replicas.probe import Server
from autopoiesis.twin.trace import Trace

_WORDS = np.frombuffer(
    b" the and for are but not you all any can had her was one our out day get has him his how man new now old see"
    b" two way who boy did its let put say she too use ask big buy car cut dog eat end far few fly fun got guy hot"
    b" job key law lay led leg lie lot low map",
    dtype="S4",
)
"""64 words: one is a token to us (4 characters) and mostly to real tokenizers."""


class PromptText:
    """Text for a trace's prompts: equal block ids give equal text, everything else is unique."""

    def __init__(self, trace: Trace, seed: int) -> None:
        """Text differs between seeds, so that one run does not profit from another's caches."""
        self._trace = trace
        self._salt = seed.to_bytes(8, "little", signed=True)

    def of(self, i: int) -> bytes:
        """Return request i's prompt, `CHARS_PER_TOKEN` characters for each of its tokens."""
        trace = self._trace
        tokens = int(trace.input_tokens[i])
        parts: list[bytes] = []
        for block in trace.blocks_of(i).tolist():
            take = min(trace.block_tokens, tokens)
            parts.append(self._text(b"block%d" % block, take))
            tokens -= take
        parts.append(self._text(b"tail%d" % i, tokens))
        return b"".join(parts)

    def _text(self, key: bytes, tokens: int) -> bytes:
        digest = hashlib.shake_128(key, usedforsecurity=False)
        digest.update(self._salt)
        picks = np.frombuffer(digest.digest(tokens), np.uint8)
        return _WORDS[picks & 63].tobytes()


def request_body(trace: Trace, i: int, prompt: bytes, server: Server) -> bytes:
    """Return request i as a streamed chat completion.

    A simulated replica is told the recorded length beside the client's limit, so that nothing on
    the way learns it; a real one is made to produce it.
    """
    output, limit = int(trace.output_tokens[i]), int(trace.max_output_tokens[i])
    if server.simulated:
        length = b'"max_tokens":%d,"vllm_xargs":{"simulated_output_tokens":%d}' % (limit, output)
    else:
        length = b'"max_tokens":%d,"ignore_eos":true' % output
    priority = int(trace.priority[i])
    return b'{"model":%b,"messages":[{"role":"user","content":"%b"}],"stream":true,%b%b%b}' % (
        orjson.dumps(server.models[0]),
        prompt,
        b'"stream_options":{"include_usage":true},',
        b'"priority":%d,' % priority if priority else b"",
        length,
    )
