"""Keeps the headers of a replica's answer back until its first byte has come.

vLLM sends the headers of a stream before its first token. Once they are passed on, Envoy can ask no
other replica any more, though the client has seen nothing of the answer. So they wait before Envoy's
router, in a WebAssembly module that Envoy runs itself. As text it is

    (module
      (memory (export "memory") 0)
      (func (export "proxy_abi_version_0_2_1"))
      (func (export "malloc") (param i32) (result i32) (i32.const 0))
      (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (i32.eqz (local.get 2))))

Its last function is asked about each answer's headers: 0 lets them go on, 1 has them wait for the
body. The third parameter says that there is no body.
"""

import base64
from collections.abc import Sequence

from autopoiesis.gateway.resource import Config, typed

_TYPE, _FUNCTION, _MEMORY, _EXPORT, _CODE = 1, 3, 5, 7, 10
"""Kinds of section, in the order in which they stand."""
_I32, _FUNCTION_TYPE, _NO_LOCALS, _END = b"\x7f", b"\x60", b"\x00", b"\x0b"
_I32_CONST_0, _LOCAL_GET_2, _I32_EQZ = b"\x41\x00", b"\x20\x02", b"\x45"
_AS_FUNCTION, _AS_MEMORY = 0, 2

_FUNCTIONS = (
    ("proxy_abi_version_0_2_1", 0, 0, b""),
    ("malloc", 1, 1, _I32_CONST_0),
    ("proxy_on_response_headers", 3, 1, _LOCAL_GET_2 + _I32_EQZ),
)
"""Name, how many numbers it takes and gives, instructions."""


def module() -> bytes:
    """Return the module in WebAssembly's binary form."""
    types = [
        _FUNCTION_TYPE + _vector([_I32] * takes) + _vector([_I32] * gives)
        for _, takes, gives, _ in _FUNCTIONS
    ]
    numbers = [bytes([i]) for i in range(len(_FUNCTIONS))]
    exports = [_export(name, _AS_FUNCTION, i) for i, (name, *_) in enumerate(_FUNCTIONS)]
    bodies = [_sized(_NO_LOCALS + code + _END) for *_, code in _FUNCTIONS]
    return b"".join(
        (
            b"\0asm\x01\0\0\0",
            _section(_TYPE, types),
            _section(_FUNCTION, numbers),
            _section(_MEMORY, [b"\0\0"]),
            _section(_EXPORT, [_export("memory", _AS_MEMORY, 0), *exports]),
            _section(_CODE, bodies),
        )
    )


def first_byte_filters() -> list[Config]:
    """Return the filters between Envoy's router and the connections to replicas."""
    code = {"local": {"inline_bytes": base64.b64encode(module()).decode()}}
    return [
        typed(
            "first-byte",
            "extensions.filters.http.wasm.v3.Wasm",
            config={
                "name": "first-byte",
                "allow_on_headers_stop_iteration": True,
                "failure_policy": "FAIL_OPEN",
                "vm_config": {"runtime": "envoy.wasm.runtime.v8", "code": code},
            },
        ),
        typed("codec", "extensions.filters.http.upstream_codec.v3.UpstreamCodec"),
    ]


def _section(kind: int, items: Sequence[bytes]) -> bytes:
    return bytes([kind]) + _sized(_vector(items))


def _vector(items: Sequence[bytes]) -> bytes:
    return bytes([len(items)]) + b"".join(items)


def _export(name: str, what: int, number: int) -> bytes:
    return _sized(name.encode()) + bytes([what, number])


def _sized(data: bytes) -> bytes:
    """Put the size before it, which is below 128 bytes everywhere here."""
    return bytes([len(data)]) + data
