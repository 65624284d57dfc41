import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopoiesis.replicas.fleet import (
    FleetError,
    Member,
    free_ports,
    read_fleet,
    simulated_command,
    write_fleet,
)

members = st.lists(
    st.builds(
        Member,
        name=st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True),
        address=st.builds("{}:{}".format, st.ip_addresses(v=4), st.integers(1, 65535)),
        profile=st.text(min_size=1, max_size=20),
        speed=st.floats(0.01, 100.0),
        kind=st.sampled_from(["simulated", "remote"]),
        kv_tokens=st.integers(0, 10**9),
    ),
    max_size=6,
    unique_by=(lambda m: m.name, lambda m: m.address),
)


@settings(max_examples=15, deadline=None)
@given(members)
def test_a_fleet_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, fleet: list[Member]
) -> None:
    path = tmp_path_factory.mktemp("run") / "fleet.json"
    write_fleet(path, fleet)
    assert read_fleet(path) == tuple(fleet)
    assert [p.name for p in path.parent.iterdir()] == ["fleet.json"]


def test_a_reader_never_sees_half_a_fleet(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    fleets = [
        [Member(f"r{i}", f"10.0.{size}.{i}:8000", "p" * 500) for i in range(size)]
        for size in (1, 40)
    ]
    write_fleet(path, fleets[0])
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            seen.append(len(read_fleet(path)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(30):
            write_fleet(path, fleets[i % 2])
    finally:
        done.set()
        reader.join()
    assert set(seen) <= {1, 40}
    assert seen


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "a b"}, "no name"),
        ({"name": ""}, "no name"),
        ({"address": "10.0.0.1"}, "give host:port"),
        ({"address": "10.0.0.1:0"}, "give host:port"),
        ({"address": "10.0.0.1:70000"}, "give host:port"),
        ({"address": "http://10.0.0.1:80"}, "give host:port"),
        ({"speed": 0.0}, "above 0"),
        ({"speed": float("nan")}, "above 0"),
        ({"kind": "imagined"}, "simulated, remote or vllm"),
        ({"kv_tokens": -1}, "negative"),
    ],
)
def test_a_wrong_member_is_refused(fields: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"name": "r0", "address": "10.0.0.1:8000", "profile": "p"}
    assert Member(**good).url == "http://10.0.0.1:8000"
    with pytest.raises(FleetError, match=says):
        Member(**good | fields)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("{}", "must hold a list"),
        ("[5]", "not understood"),
        ('[{"name": "r0"}]', "not understood"),
        ('[{"name": "r0", "address": "h:1", "profile": "p", "colour": 1}]', "not understood"),
        ('[{"name": "r0", "address": "h", "profile": "p"}]', "give host:port"),
        (
            json.dumps([{"name": "r", "address": f"h:{i + 1}", "profile": "p"} for i in range(2)]),
            "the name r",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "fleet.json"
    path.write_text(content)
    with pytest.raises(FleetError, match=says):
        read_fleet(path)
    with pytest.raises(FleetError, match="cannot be read"):
        read_fleet(tmp_path / "none.json")


def test_two_members_cannot_share_an_address(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="the address h:1"):
        write_fleet(tmp_path / "f.json", [Member("a", "h:1", "p"), Member("b", "h:1", "p")])
    assert not list(tmp_path.iterdir())


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", port))


def test_the_command_of_a_simulated_member() -> None:
    command = simulated_command(Member("sim-0", "127.0.0.1:8001", "p", speed=0.5), seed=3)
    assert command.argv[:3] == [sys.executable, "-m", "autopoiesis.replicas.simulated"]
    options = dict(zip(command.argv[3::2], command.argv[4::2], strict=True))
    assert options == {
        "--name": "sim-0",
        "--host": "127.0.0.1",
        "--port": "8001",
        "--profile": "p",
        "--speed": "0.5",
        "--seed": "3",
    }
    assert command.environment["NUMBA_DISABLE_JIT"] == "1"
