"""State as named arrays, and arrays as plain bytes: no pickle, the same on every machine."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

State = dict[str, NDArray[np.generic]]

Packed = tuple[str, list[int], bytes]
"""dtype (numpy's name with byte order), shape, data in C order."""

_KINDS = "biufcSU"


def pack(name: str, array: NDArray[np.generic]) -> Packed:
    """Return an array of numbers, truth values or fixed-length strings as bytes, little-endian.

    Raises:
        ValueError: the array holds something else.
    """
    if array.dtype.kind not in _KINDS:
        raise ValueError(f"state array {name!r} has dtype {array.dtype}; store numbers or strings")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.dtype.str, list(array.shape), little.tobytes()


def unpack(name: str, dtype: str, shape: Sequence[int], data: bytes) -> NDArray[np.generic]:
    """Return the array that `pack` made these bytes of, in native byte order.

    Raises:
        ValueError: bytes, shape and dtype do not fit each other.
    """
    kind = np.dtype(dtype)
    if kind.kind not in _KINDS or kind.itemsize * int(np.prod(shape)) != len(data):
        raise ValueError(
            f"state array {name!r} has {len(data)} bytes, not {dtype} of {list(shape)}"
        )
    array: NDArray[np.generic] = np.ndarray(tuple(shape), kind, buffer=data)
    return array.astype(kind.newbyteorder("="), copy=True)
