"""Ways in from Python to kernels that otherwise only kernels call."""

import numba

from autopoiesis.arms import fleet, prefix


@numba.njit
def hit_tokens(state, r, blocks, input_tokens):
    return fleet.hit_tokens(state, r, blocks, input_tokens)


@numba.njit
def matching_blocks(index, r, blocks):
    return prefix.matching_blocks(index, r, blocks)


@numba.njit
def remember(index, r, blocks):
    prefix.remember(index, r, blocks)


@numba.njit
def bucket_of(index, block):
    return prefix._bucket_of(index, block)
