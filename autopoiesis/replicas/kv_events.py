"""What vLLM's KV events tell of a replica's prefix cache: that it was emptied, and how much it evicts.

vLLM publishes a message of three frames over ZMQ (topic, 8-byte sequence number, msgpack) for each step that
changed the cache (`vllm/distributed/kv_events.py`). Blocks are named there by hashes of token ids, which
nobody can compare with a prompt's text; how many go needs no names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast


class News(NamedTuple):
    """What became of one replica's cache since it was told last."""

    cleared: bool = False
    """It was emptied, or is that of a new process."""
    evicted_tokens: int = 0
    """Tokens whose blocks went since; none of before it was emptied."""
    missed: int = 0
    """Messages that never came."""


@dataclass(slots=True)
class Feed:
    """Reads one replica's messages in their order. Not a message of vLLM's: ValueError."""

    last: int | None = None
    """Sequence number of the last message."""
    block_tokens: int = 0
    """Tokens per block, 0 before any was stored."""
    cleared: bool = False
    evicted_tokens: int = 0
    missed: int = 0

    def read(self, frames: Sequence[bytes]) -> None:
        """Take in one message. Raises ValueError, then nothing has changed."""
        if len(frames) != 3 or len(frames[1]) != 8:
            raise ValueError("it has not the three frames of vLLM's")
        sequence = int.from_bytes(frames[1], "big")
        events = decode(frames[2])
        if self.last is not None and sequence <= self.last:  # its publisher began anew
            self._clear()
        elif self.last is not None:
            self.missed += sequence - self.last - 1
        self.last = sequence
        for kind, fields in events:
            if kind == "AllBlocksCleared":
                self._clear()
            elif kind == "BlockStored":
                self.block_tokens = fields["block_size"]
            elif fields.get("medium") in {None, "GPU"}:  # not of a cache in the host's memory
                self.evicted_tokens += len(fields["block_hashes"]) * self.block_tokens

    def news(self) -> News | None:
        """Return what is new since the last call, None if nothing is."""
        told = News(self.cleared, self.evicted_tokens, self.missed)
        self.cleared, self.evicted_tokens, self.missed = False, 0, 0
        return told if any(told) else None

    def _clear(self) -> None:
        self.cleared, self.evicted_tokens = True, 0


_FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}
"""Their first fields, in the order that versions had which sent events as arrays."""


def decode(payload: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of a batch, each its kind and its fields; kinds unknown here are left out.

    Raises:
        ValueError: it is no batch of vLLM's.
    """
    import msgspec  # noqa: PLC0415 - an extra

    try:
        batch: Any = msgspec.msgpack.decode(payload)
        if not isinstance(batch, list) or not isinstance(batch[1], list):
            raise TypeError("a batch is a list of its time and its events")
        told: list[tuple[str, dict[str, Any]]] = []
        for event in cast("list[Any]", batch[1]):
            if isinstance(event, dict):
                fields = cast("dict[str, Any]", event)
                kind = fields["type"]
            else:
                kind = event[0]
                fields = dict(zip(_FIELDS.get(kind, ()), event[1:], strict=False))
            if kind in _FIELDS:
                _check(kind, fields)
                told.append((kind, fields))
    except (msgspec.DecodeError, LookupError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"its events are not understood ({error!r})") from None
    return told


def _check(kind: str, fields: Mapping[str, Any]) -> None:
    if kind == "BlockStored":
        size = fields["block_size"]
        if type(size) is not int or size < 1:
            raise TypeError("block_size must be a whole number above 0")
    if kind == "BlockRemoved" and not isinstance(fields["block_hashes"], list):
        raise TypeError("block_hashes must be a list")
