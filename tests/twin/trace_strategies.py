"""Random small traces for hypothesis."""

import numpy as np
from hypothesis import strategies as st

from autopoiesis.twin.trace import Trace

WHOLE = st.integers(-(2**63), 2**63 - 1)


@st.composite
def traces(draw: st.DrawFn, block_tokens: int | None = None) -> Trace:
    n = draw(st.integers(0, 12))
    count = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    positive = st.integers(1, 1 << 20)
    gaps = draw(st.lists(st.floats(0, 100), min_size=n, max_size=n))

    def column(elements: st.SearchStrategy[int], size: int = n) -> np.ndarray:
        return np.array(draw(st.lists(elements, min_size=size, max_size=size)), np.int64)

    return Trace(
        arrival_s=np.cumsum(np.array(gaps, np.float64)),
        input_tokens=column(positive),
        output_tokens=column(positive),
        max_output_tokens=column(positive),
        session=column(WHOLE),
        priority=column(st.integers(-5, 5)).astype(np.float64),
        block_start=np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        blocks=column(WHOLE.filter(bool), sum(count)),
        block_tokens=draw(st.integers(1, 512)) if block_tokens is None else block_tokens,
        name="t",
    )
