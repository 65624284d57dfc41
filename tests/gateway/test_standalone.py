"""`autopoiesis picker` behind an Envoy that speaks only the endpoint picker protocol."""

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from foreign_envoy import configuration
from stack import UPSTREAM, Answer, chat, wait_until

from autopoiesis.gateway import envoy
from autopoiesis.replicas.fleet import free_ports

LAST_FIRST = "def score(request, replica, fleet):\n    return -replica.position\n"
SHED_SIXTY = LAST_FIRST + (
    "def admit(request, fleet):\n    return abs(request.max_output_tokens - 60)\n"
)


class Cluster:
    """Two replicas and a picker; gateways are started as they are needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.picker_port, *ports = free_ports(3)
        self.replicas = [f"127.0.0.1:{port}" for port in ports]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.gateways: dict[str, int] = {}
        for i, port in enumerate(ports):
            self.start([sys.executable, str(UPSTREAM), str(port), f"r{i}"], f"r{i}")
        (directory / "arm.py").write_text(SHED_SIXTY)
        for port in ports:
            wait_until(lambda port=port: answers(port))
        urls = [word for address in self.replicas for word in ("--replica", f"http://{address}")]
        options = ["--port", str(self.picker_port), "--arm", str(directory / "arm.py")]
        self.start([sys.executable, "-m", "autopoiesis", "picker", *urls, *options], "picker")
        wait_until(lambda: "ready" in (directory / "picker.log").read_text(), 120)

    def start(self, argv: list[str], name: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(argv, stdout=log, stderr=log))

    def gateway(self, body_mode: str, subset: list[str] | None = None) -> int:
        name = f"{body_mode}{subset}"
        if name not in self.gateways:
            (port,) = free_ports(1)
            told = configuration(port, self.picker_port, self.replicas, body_mode, subset)
            file = self.directory / f"{port}.json"
            file.write_text(json.dumps(told))
            argv = [str(envoy.binary()), "-c", str(file), "--disable-hot-restart"]
            self.start([*argv, "--log-level", "warning", "--concurrency", "1"], f"envoy-{port}")
            wait_until(lambda: answers(port))
            self.gateways[name] = port
        return self.gateways[name]


def answers(port: int) -> bool:
    try:
        return ask(port, None).status in {200, 503}
    except OSError:
        return False


def ask(port: int, body: object, path: str = "/v1/chat/completions") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        if body is None:
            connection.request("GET", "/v1/models")
        else:
            headers = {"content-type": "application/json"}
            connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        headers = {k.lower(): v for k, v in response.getheaders()}
        return Answer(response.status, headers, response.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    for process in made.processes:
        process.kill()
        process.wait(10)


MODES = pytest.mark.parametrize("mode", ["FULL_DUPLEX_STREAMED", "BUFFERED"])


@MODES
def test_the_gateway_sends_requests_where_the_arm_says(cluster: Cluster, mode: str):
    port = cluster.gateway(mode)
    for text in ("hello", "long " * 50_000):
        answer = ask(port, chat(text, max_tokens=3))
        assert (answer.status, answer.headers["x-served-by"]) == (200, "r1")
        assert answer.json["usage"]["completion_tokens"] == 3
    assert ask(port, None).json["data"]


@MODES
def test_streams_pass_token_by_token(cluster: Cluster, mode: str):
    port = cluster.gateway(mode)
    answer = ask(port, chat(stream=True, max_tokens=30, test={"each_s": 0.005}))
    assert answer.status == 200
    assert answer.body.count(b'"word "') == 30
    assert answer.body.endswith(b"[DONE]\n\n")


@MODES
def test_what_is_wrong_and_what_is_shed_is_answered_by_the_picker(cluster: Cluster, mode: str):
    port = cluster.gateway(mode)
    wrong = ask(port, {"messages": 1})
    assert (wrong.status, wrong.json["error"]["param"]) == (400, "messages")
    shed = ask(port, chat(max_tokens=60))
    assert (shed.status, shed.headers["retry-after"]) == (429, "1")
    assert shed.json["error"]["type"] == "rate_limit_error"


@MODES
def test_it_picks_within_the_subset_only(cluster: Cluster, mode: str):
    first = cluster.gateway(mode, cluster.replicas[:1])
    assert {ask(first, chat()).headers["x-served-by"] for _ in range(4)} == {"r0"}
    nobody = ask(cluster.gateway(mode, ["127.0.0.1:1"]), chat())
    assert nobody.status == 503
    assert nobody.json["error"]["code"] == "no_replica"


def test_it_tells_its_health(cluster: Cluster):
    with grpc.insecure_channel(f"127.0.0.1:{cluster.picker_port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        for name in (b"", b"readiness", b"envoy.service.ext_proc.v3.ExternalProcessor"):
            asked = b"\x0a" + bytes([len(name)]) + name if name else b""
            assert check(asked, timeout=5) == b"\x08\x01"


def test_without_replicas_it_does_not_start(tmp_path: Path):
    argv = [sys.executable, "-m", "autopoiesis", "picker", "--data-dir", str(tmp_path)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "--replica URL" in ended.stderr
