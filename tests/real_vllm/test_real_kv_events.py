"""A real vLLM with a small cache tells of what it evicts, and the gateway's index follows."""

import json
import urllib.request

import pytest
from conftest import SIZES
from gateway_process import run, serving, wait_until

from autopoiesis.replicas.kv_subscriber import KvEvents

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

BLOCKS = 24
"""Of 128 tokens each: what the longest context takes and half as much again."""


@pytest.fixture(scope="module")
def small(vllm_python, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    options = ["--vllm", str(tiny_model), "--vllm-python", vllm_python, "--replicas", "1"]
    options += ["--window", "2", "--synthesizer", "none", "--", *SIZES]
    options += ["--block-size", "128", "--num-gpu-blocks-override", str(BLOCKS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # for /reset_prefix_cache
        with serving(folder, *options, start_limit_s=400) as gateway:
            yield gateway


def member(gateway):
    return json.loads((gateway.folder / ".autopoiesis/run/fleet.json").read_text())[0]


def ask(gateway, subject):
    """Ask for one token after a prompt of about 3,000 characters."""
    prompt = f"{subject} " + f"ba de ka {subject} " * 200
    body = {"model": "tiny", "prompt": prompt[:3000], "max_tokens": 1}
    request = urllib.request.Request(
        f"{gateway.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["usage"]["prompt_tokens"]


def expected(gateway, count):
    """Return the tokens that the gateway expected in the cache for each request, oldest first."""
    query = "select cached_tokens from requests order by arrived_s"

    def found():
        _, out, _ = run("sql", "--format", "json", query, cwd=gateway.folder)
        return [row["cached_tokens"] for row in json.loads(out or "[]")]

    wait_until(lambda: len(found()) >= count, 60)
    return found()


def test_the_index_forgets_what_vllm_evicts_and_all_when_it_is_cleared(small):
    heard = []
    endpoint = member(small)["kv_events"]
    assert endpoint.startswith("ipc://")
    events = KvEvents(lambda _name, news: heard.append(news))
    events.follow({"replica-0": endpoint})
    try:
        ask(small, "warm")
        tokens = [ask(small, "first"), ask(small, "first")]
        fill = BLOCKS * 128 // tokens[0] + 2
        for i in range(fill):
            ask(small, f"other{i}")
        wait_until(lambda: any(n.evicted_tokens for n in heard), 30)
        assert not any(n.cleared or n.missed for n in heard)
        ask(small, "first")  # gone from vLLM; the index must not believe otherwise
        ask(small, "first")
        reset = urllib.request.Request(
            f"http://{member(small)['address']}/reset_prefix_cache", method="POST"
        )
        urllib.request.urlopen(reset, timeout=30).close()
        ask(small, "poke")  # vLLM tells of it with the events of its next step
        wait_until(lambda: any(n.cleared for n in heard), 30)
        ask(small, "first")
    finally:
        events.stop()
    told = expected(small, 3 + fill + 4)
    assert 0 == told[1]
    assert told[2] > 0
    assert 0 == told[3 + fill]
    assert told[4 + fill] > 0
    assert 0 == told[6 + fill]
