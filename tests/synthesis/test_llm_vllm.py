"""The fleet proposer against a real vLLM, even one whose weights are random (VLLM_URL, without /v1)."""

import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
from synthesis_scenes import uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.synthesis.launch import run_worker_now
from autopoiesis.synthesis.llm.answer import drafts_in
from autopoiesis.synthesis.llm.clerk import Errand
from autopoiesis.synthesis.llm.conversation import Ask, Reply
from autopoiesis.synthesis.llm.exchange import read_recording
from autopoiesis.synthesis.llm.settings import LlmSettings

URL = os.environ.get("VLLM_URL", "").rstrip("/")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not URL, reason="set VLLM_URL to the address of a vLLM server"),
]


@pytest.fixture(scope="module")
def control_url():
    """A control port that calls the server idle."""

    class Idle(BaseHTTPRequestHandler):
        def do_GET(self):
            body = orjson.dumps({"idle": True, "why": "as told", "replica": "r0"})
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Idle)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def exchanges(folder, control_url, origin, **settings) -> list[tuple[Ask, Reply]]:
    """Run a cycle and return what was asked and answered in it."""
    chosen = LlmSettings(api_key_env="", timeout_s=60.0, **settings).model_dump(mode="json")
    fleet = origin is Origin.FLEET
    errand = Errand(
        chosen, str(folder), 0, control_url if fleet else "", {"r0": URL} if fleet else {}
    )
    brief = replace(uneven_brief(), synthesizer=origin, budget_s=90.0, max_candidates=12)
    row = run_worker_now(brief, errand=errand)
    assert row.error == ""
    (path,) = (folder / "exchanges").glob("*.jsonl")
    return list(read_recording(path).exchanges)


def is_policy(source: str) -> bool:
    try:
        verify(source)
    except PolicyError:
        return False
    return True


def test_held_to_the_grammar_even_a_random_model_writes_policies(tmp_path, control_url):
    answers = [r for _, r in exchanges(tmp_path, control_url, Origin.FLEET) if r.texts]
    assert answers
    assert all(reply.grammar for reply in answers)
    whole = [t for r in answers for t, cut in zip(r.texts, r.cut, strict=True) if not cut]
    assert len(whole) >= 3
    assert all(is_policy(text) for text in whole)


def test_without_the_grammar_all_it_writes_is_refused(tmp_path, control_url):
    settings = {"base_url": f"{URL}/v1", "models": ("tiny",), "max_tokens": 256}
    answers = [r for _, r in exchanges(tmp_path, control_url, Origin.OPENAI, **settings) if r.texts]
    assert answers
    assert not any(reply.grammar for reply in answers)
    drafts = [draft for reply in answers for text in reply.texts for draft in drafts_in(text)]
    assert not any(is_policy(draft.source) for draft in drafts)
