import hashlib
import re
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_strategies import traces

from autopoiesis.twin.composition import splice
from autopoiesis.twin.trace import Trace, TraceError, read_trace, write_trace

TRACES = Path(__file__).parents[2] / "traces"


def same(a: Trace, b: Trace) -> bool:
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name))
        for f in fields(Trace)
        if f.name != "name"
    )


@pytest.mark.parametrize(
    ("name", "requests", "rate", "input_mean", "output_mean", "share", "sessions"),
    [
        ("azure2023_conv_a", 14176, 5.91, 1195, 202, None, 0),
        ("azure2023_code_a", 7491, 3.13, 2040, 28, None, 0),
        ("mooncake_conversation_a", 7851, 3.27, 12428, 347, 0.358, 0),
        ("agentic_coding_a", 12165, 0.845, 70800, 424, 0.953, 360),
    ],
)
def test_real_traces_have_their_published_figures(
    name: str,
    requests: int,
    rate: float,
    input_mean: float,
    output_mean: float,
    share: float,
    sessions: int,
) -> None:
    found = read_trace(TRACES / f"{name}.parquet").summary()
    assert (found.requests, found.sessions) == (requests, sessions)
    assert found.rate_rps == pytest.approx(rate, rel=0.005)
    assert found.input_tokens_mean == pytest.approx(input_mean, abs=0.6)
    assert found.output_tokens_mean == pytest.approx(output_mean, abs=0.6)
    assert found.prefix_share == (None if share is None else pytest.approx(share, abs=0.001))


def test_the_limit_gives_no_length_away() -> None:
    coding = read_trace(TRACES / "agentic_coding_a.parquet")
    assert len(np.unique(coding.max_output_tokens)) == 1
    assert (coding.output_tokens <= coding.max_output_tokens).all()
    conversation = read_trace(TRACES / "azure2023_conv_a.parquet")
    assert set(conversation.max_output_tokens.tolist()) == {4096}


def test_every_sample_is_listed_with_its_hash() -> None:
    listed = dict(
        re.findall(r"^([0-9a-f]{64})  (\S+)$", (TRACES / "README.md").read_text(), re.MULTILINE)
    )
    there = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in TRACES.glob("*.parquet")}
    assert {name: digest for digest, name in listed.items()} == there


def test_ids_are_hashes_of_file_and_id(tmp_path: Path) -> None:
    source = TRACES / "mooncake_conversation_a.parquet"
    trace = read_trace(source)
    assert same(trace, read_trace(source))
    assert (trace.blocks != 0).all()
    assert len(np.unique(trace.blocks)) == len(
        np.unique(np.concatenate(pq.read_table(source)["block_hashes"].to_pylist()))
    )
    other = tmp_path / "other.parquet"
    other.write_bytes(source.read_bytes())
    assert not np.isin(trace.blocks, read_trace(other).blocks).any()


def test_mooncake_ticks_are_spread(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
        '{"timestamp": 0, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]}\n'
        "\n"
        '{"timestamp": 0, "input_length": 9, "output_length": 0, "hash_ids": []}\n'
        '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
        '{"timestamp": 3000, "input_length": 1, "output_length": 5, "hash_ids": [3]}\n'
    )
    trace = read_trace(file)
    assert trace.arrival_s.tolist() == [0, 1, 2, 3, 4.5]
    assert trace.output_tokens.tolist() == [5, 6, 1, 5, 5]
    assert trace.block_start.tolist() == [0, 2, 4, 4, 6, 7]
    assert trace.block_tokens == 512
    assert trace.blocks_of(0).tolist() == trace.blocks_of(3).tolist()
    share = trace.summary().prefix_share
    assert share == pytest.approx((512 + 600) / (600 + 700 + 9 + 600 + 1))
    assert read_trace(TRACES / "mooncake_conversation_a.parquet").summary().iat_cv < 1


def test_azure_and_burstgpt_csv(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(azure)
    assert trace.arrival_s == pytest.approx([0, 4.314579], abs=1e-5)
    assert (trace.input_tokens.tolist(), trace.output_tokens.tolist()) == ([374, 396], [44, 109])
    zoned = tmp_path / "zoned.csv"
    zoned.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,9,2\n"
    )
    assert read_trace(zoned).duration_s == pytest.approx(0.99007, abs=1e-5)
    burst = tmp_path / "burst.csv"
    burst.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,"
        "Total tokens,Log Type\n"
        "5,7,1.2,ChatGPT,472,18,490,Conversation log\n"
        "45,,1.2,ChatGPT,1087,0,1087,API log\n"
        "118,7,1.2,GPT-4,417,276,693,Conversation log\n"
    )
    trace = read_trace(burst)
    assert trace.arrival_s.tolist() == [0, 40, 113]
    assert trace.output_tokens.tolist() == [18, 1, 276]
    assert trace.session[0] == trace.session[2] != 0
    assert trace.session[1] == 0


AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
GOOD = '{"timestamp": 10, "input_length": 6, "output_length": 5, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"  \n\n", "empty"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "neither Parquet, nor JSON lines, nor CSV"),
        (b"PAR1 and then nothing", "broken Parquet file"),
        (b"a,b,c\n1,2,3\n", "line 1: not a trace that is known here"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request in it"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", "line 2: has 2 fields"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,2,3\n", "line 2: `TIMESTAMP` is 'soon'"),
        (
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n\n2,x,3\n",
            "line 4: `ContextTokens` is 'x'",
        ),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,nan\n", "line 2: `GeneratedTokens` is nan"),
        (
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n5,2,3\n4,2,3\n",
            "line 3: `TIMESTAMP` is earlier",
        ),
        (GOOD.encode() + b'{"timestamp": 11, "input', "line 2: is not valid JSON"),
        (GOOD.encode() + b"[1, 2]\n", "line 2: must be a JSON object"),
        ((GOOD + GOOD.replace("6", "-6")).encode(), "line 2: `input_length` is -6"),
        ((GOOD + GOOD.replace("6", '"6"')).encode(), "line 2: `input_length` is '6'"),
        (
            (GOOD + GOOD.replace("input_length", "inputs")).encode(),
            "line 2: `input_length` is None",
        ),
        ((GOOD + GOOD.replace("10", "9")).encode(), "line 2: `timestamp` is earlier"),
        ((GOOD + GOOD.replace("[1]", "[1.5]")).encode(), "line 2: `hash_ids` must be a list"),
        ((GOOD + GOOD.replace("[1]", "7")).encode(), "line 2: `hash_ids` must be a list"),
        (
            (GOOD + GOOD.replace("[1]", f"[{2**63}]")).encode(),
            "line 2: `hash_ids` has a number beyond",
        ),
        (
            (GOOD + GOOD.replace("6", "6.5")).encode(),
            "line 2: `input_length` is 6.5; it must be a whole",
        ),
        ((GOOD + GOOD.replace("6", "NaN")).encode(), "line 2: is not valid JSON"),
        ((GOOD + GOOD.replace("10", "-10")).encode(), "line 2: `timestamp` is -10"),
        ((GOOD + GOOD.replace("6", "0")).encode(), "line 2: `input_length` is 0"),
        (AZURE + b"nan,2,3\n", "line 2: `TIMESTAMP` is nan"),
        (AZURE + b"1,2,3\ninf,2,3\n", "line 3: `TIMESTAMP` is inf"),
        (AZURE + b"1,-2,3\n", "line 2: `ContextTokens` is -2"),
        (AZURE + b"1,2,2.5\n", "line 2: `GeneratedTokens` is 2.5; it must be a whole number"),
        (AZURE + b"1,,3\n", "line 2: `ContextTokens` is ''"),
        (
            AZURE + b"1,1e300,3\n",
            "line 2: `ContextTokens` is 1e+300; it must be finite and 1 to 2^53",
        ),
        (BURST + b"5,,1,m,4,3,7,x\n1,,1,m,4,3,7,x\n", "line 3: `Timestamp` is earlier"),
        (BURST + b"5,,1,m,-4,3,7,x\n", "line 2: `Request tokens` is -4"),
        (BURST + b"5,,1,m,4,nan,7,x\n", "line 2: `Response tokens` is nan"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "broken"
    file.write_bytes(content)
    with pytest.raises(TraceError) as error:
        read_trace(file)
    assert says in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_broken_parquet_is_named(tmp_path: Path) -> None:
    def says(**columns: object) -> str:
        file = tmp_path / "t.parquet"
        pq.write_table(pa.table(columns), file)
        with pytest.raises(TraceError) as error:
            read_trace(file)
        return str(error.value)

    good = {"arrival_s": [0.0, 1.0], "input_tokens": [1, 2], "output_tokens": [1, 2]}
    assert "has no column `arrival_s`" in says(input_tokens=[1])
    assert "has no rows" in says(arrival_s=[], input_tokens=[], output_tokens=[])
    assert "row 2: `arrival_s` is earlier" in says(**good | {"arrival_s": [1.0, 0.0]})
    assert "row 2: `input_tokens` is null" in says(**good | {"input_tokens": [1, None]})
    assert "row 1: `output_tokens` is -1" in says(**good | {"output_tokens": [-1, 2]})
    assert "row 2: `input_tokens` is 'x'" in says(**good | {"input_tokens": ["1", "x"]})
    nan = float("nan")
    assert "row 2: `arrival_s` is nan" in says(**good | {"arrival_s": [0.0, nan]})
    assert "row 2: `arrival_s` is inf" in says(**good | {"arrival_s": [0.0, float("inf")]})
    assert "row 1: `arrival_s` is -1" in says(**good | {"arrival_s": [-1.0, 0.0]})
    assert "row 2: `output_tokens` is nan" in says(**good | {"output_tokens": [1.0, nan]})
    assert "row 1: `input_tokens` is 0" in says(**good | {"input_tokens": [0, 2]})
    assert "row 1: `input_tokens` is 1.5; it must be a whole" in says(
        **good | {"input_tokens": [1.5, 2.0]}
    )
    assert "`input_tokens` holds bool" in says(**good | {"input_tokens": [True, True]})
    assert "`arrival_s` holds timestamp" in says(
        **good | {"arrival_s": [datetime(2026, 1, 1, tzinfo=UTC)] * 2}
    )
    assert "row 1: `priority` is nan" in says(**good, priority=[nan, 0.0])
    assert "row 2: `max_output_tokens` is 0" in says(**good, max_output_tokens=[1, 0])
    assert "`session_id` must be a column of text" in says(**good, session_id=[["a"], ["b"]])
    assert "row 2: `block_hashes` holds a null" in says(
        **good, block_hashes=pa.array([[1], [3, None]])
    )
    assert "no `block_size_tokens`" in says(**good, block_hashes=[[1], [2]])
    assert "`block_hashes` must be a column of lists" in says(**good, block_hashes=["a", "b"])
    with pytest.raises(TraceError, match="there is no such file"):
        read_trace(tmp_path / "none.parquet")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)


@settings(max_examples=60, deadline=None)
@given(traces())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    file = tmp_path_factory.mktemp("traces") / "t.parquet"
    write_trace(trace, file)
    if len(trace):
        assert same(read_trace(file), trace)
    else:
        with pytest.raises(TraceError, match="has no rows"):
            read_trace(file)


@settings(max_examples=60, deadline=None)
@given(traces(), st.floats(0, 500))
def test_cutting_loses_nothing(trace: Trace, at_s: float) -> None:
    early, late = trace.slice(0, at_s), trace.slice(at_s, np.inf)
    assert len(early) + len(late) == len(trace)
    assert (early.arrival_s < at_s).all()
    assert np.concatenate([early.blocks, late.blocks]).tolist() == trace.blocks.tolist()
    assert late.arrival_s + at_s == pytest.approx(trace.arrival_s[len(early) :])
    assert same(trace.head(len(early)), early)
    spliced = splice([early, late], "both")
    assert spliced.blocks.tolist() == trace.blocks.tolist()
    assert spliced.block_start.tolist() == trace.block_start.tolist()
    assert trace.speed(2.0).duration_s == pytest.approx(trace.duration_s / 2)


@settings(max_examples=60, deadline=None)
@given(traces(), st.randoms(use_true_random=False))
def test_selected_requests_keep_all_they_have(trace: Trace, random: Random) -> None:
    rows = np.array(sorted(random.sample(range(len(trace)), len(trace) // 2)), np.int64)
    some = trace.select(rows)
    assert len(some) == len(rows)
    for i, row in enumerate(rows.tolist()):
        assert some.blocks_of(i).tolist() == trace.blocks_of(row).tolist()
    assert some.input_tokens.tolist() == trace.input_tokens[rows].tolist()
    assert same(trace.select(np.arange(len(trace))), trace)


def test_a_trace_refuses_what_it_cannot_be() -> None:
    mooncake = read_trace(TRACES / "mooncake_conversation_a.parquet").head(3)
    with pytest.raises(ValueError, match="speed"):
        mooncake.speed(0)
    with pytest.raises(ValueError, match="must not fall"):
        replace(mooncake, arrival_s=np.array([2.0, 1.0, 3.0]))
