"""Two models behind one gateway, each with a fleet, arms and telemetry of its own."""

import signal

import httpx
import openai
import pytest
from gateway_process import serving, wait_until

from autopoiesis.orchestrator.models import of_each
from autopoiesis.orchestrator.settings import Settings, SettingsError
from autopoiesis.replicas.fleet import free_ports


def settings(**tables):
    return Settings(port=8000, control_port=8001, simulate=3, models=tables)


def test_a_table_holds_what_is_different_for_its_model():
    small, large = of_each(
        settings(small={}, large={"names": ["org/large", "lora"], "simulate": 8})
    )

    assert ("small",) == small.fleet.models
    assert ("org/large", "lora") == large.fleet.models
    assert (3, 8) == (small.settings.simulate, large.settings.simulate)
    assert (8001, 8002) == (small.settings.control_port, large.settings.control_port)
    assert small.settings.data_dir != large.settings.data_dir
    assert {} == large.settings.models
    assert "replicas-large" == large.fleet.replicas


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"a/b": {}}, "models.a/b: a table's name is of"),
        ({"a": {"names": []}}, "models.a.names: give a list"),
        ({"a": {"names": ["x", 3]}}, "models.a.names: give a list"),
        ({"a": {"names": ["x"]}, "b": {"names": ["x"]}}, "the name x is given twice"),
        ({"a": {}, "b": {"control_port": 8001}}, "the control_port 8001 is given twice"),
        ({"a": {"port": 9}}, "models.a.port: it is the same for all"),
        ({"a": {"simulate": 0}}, "models.a.simulate: "),
        ({"a": {"simulat": 1}}, "models.a.simulat: "),
    ],
)
def test_a_wrong_table_is_told_in_a_sentence(tables, complaint):
    with pytest.raises(SettingsError) as error:
        of_each(settings(**tables))

    assert complaint in str(error.value)


def test_a_fleet_beside_the_models_is_nobodys():
    with pytest.raises(SettingsError, match="belongs into a model's table"):
        of_each(settings(a={}).model_copy(update={"replica": ("http://127.0.0.1:1",)}))


CONFIG = """
window_s = 1
synthesizer = "none"
[models.small]
simulate = 1
control_port = {}
[models.large]
names = ["org/large", "lora"]
simulate = 2
control_port = {}
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ports = free_ports(2)
    (folder / "two.toml").write_text(CONFIG.format(*ports))
    with serving(folder, "--config", "two.toml") as running:
        running.control_ports = ports
        yield running


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def say(client, model, **fields):
    messages = [{"role": "user", "content": "hello"}]
    return client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=2, **fields
    )


def test_a_request_goes_to_its_models_fleet(gateway, client):
    fleets = {
        model: {say(client, model).headers["x-autopoiesis-replica"] for _ in range(6)}
        for model in ("small", "org/large")
    }

    assert {
        "small": {"sim-0"},
        "org/large": {"sim-0", "sim-1"},
    } == fleets
    assert "x-autopoiesis-arm" in say(client, "small").headers
    assert "x-autopoiesis-arm" in say(client, "org/large").headers


def test_each_model_has_records_of_its_own(gateway, client):
    def models(port):
        query = {"query": "select distinct model from requests"}
        answer = httpx.post(f"http://127.0.0.1:{port}/sql", json=query, timeout=20)
        return {row[0] for row in answer.json()["rows"]}

    say(client, "small")
    say(client, "org/large")
    small, large = gateway.control_ports
    wait_until(lambda: models(small) and models(large), 30)
    assert {"small"} == models(small)
    assert {"org/large"} == models(large)


def test_all_models_are_listed(client):
    assert ["small", "org/large", "lora"] == [model.id for model in client.models.list()]


def test_a_model_that_is_not_there_is_not_found(client):
    with pytest.raises(
        openai.NotFoundError, match="'gpt-9' does not exist; there are small"
    ) as told:
        say(client, "gpt-9")

    assert ("model_not_found", "model") == (told.value.code, told.value.param)


@pytest.mark.parametrize(
    "body", [b'{"messages": []}', b"{", b"", b'{"model": ""}', b'{"model": {}}']
)
def test_a_body_without_a_model_is_wrong(gateway, body):
    for path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        answer = httpx.post(f"{gateway.url}{path}", content=body, timeout=20)
        assert 400 == answer.status_code, path
        assert "model" == answer.json()["error"]["param"]


def test_another_name_of_a_model_comes_to_its_fleet(client):
    with pytest.raises(openai.NotFoundError, match="this server has `org/large`"):
        say(client, "lora")  # a simulated replica has no adapters, and says so itself


def test_a_stream_and_a_large_body_pass(client):
    chunks = list(say(client, "org/large", stream=True).parse())
    assert chunks
    note = {"note": "so many words " * 100_000}
    answer = client.completions.create(model="small", prompt="hi", max_tokens=1, extra_body=note)
    assert 1 == answer.usage.completion_tokens


def test_a_model_serves_on_while_the_picker_of_another_is_away(gateway, client):
    picker = next(
        p for p in gateway.running("autopoiesis.gateway.picker") if "small" in " ".join(p.cmdline())
    )
    picker.send_signal(signal.SIGSTOP)
    try:
        assert "x-autopoiesis-arm" in say(client, "org/large").headers
        assert "sim-0" == say(client, "small").headers["x-autopoiesis-replica"]  # Envoy alone
    finally:
        picker.send_signal(signal.SIGCONT)


def test_settings_are_read_again(gateway, client):
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "read again" in (gateway.folder / "serve.log").read_text(), 30)
    assert "sim" in say(client, "org/large").headers["x-autopoiesis-replica"]
