"""Keys, limits, TLS and HTTP/2, each through real Envoy, whose settings change while it serves."""

import asyncio
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from stack import Answer, Stack, chat, wait_until

from autopoiesis.gateway import envoy
from autopoiesis.gateway.envoy import EnvoyError
from autopoiesis.gateway.keys import KeyFileError, read_keys
from autopoiesis.gateway.settings import DataPlaneSettings

ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"


def changes(stack: Stack) -> int:
    return sum(asyncio.run(envoy.statistics(stack.run_dir, "lds.update_success")).values())


def change(stack: Stack, settings: DataPlaneSettings) -> None:
    before = changes(stack)
    envoy.change(stack.run_dir, "127.0.0.1", stack.port, settings)
    wait_until(lambda: changes(stack) > before)
    time.sleep(0.2)  # until the workers have it


@contextmanager
def changed(stack: Stack, **settings: object) -> Iterator[None]:
    change(stack, DataPlaneSettings.model_validate(settings))
    try:
        yield
    finally:
        change(stack, DataPlaneSettings())
        wait_until(lambda: stack.post(chat()).status == 200)


def key_file(directory: Path, *lines: str, mode: int = 0o600) -> Path:
    file = directory / "keys"
    file.write_text("\n".join(lines) + "\n")
    file.chmod(mode)
    return file


def with_key(stack: Stack, key: str, path: str = "/v1/chat/completions", **more: str) -> Answer:
    return stack.post(chat(), path, {"authorization": f"Bearer {key}", **more})


def test_only_who_has_a_key_comes_in(stack: Stack, tmp_path: Path):
    keys = key_file(tmp_path, f"alice {ALICE}  # a comment", "", f"bob {BOB} 600")
    with changed(stack, api_keys=keys):
        refused = stack.post(chat())
        assert refused.status == 401
        assert refused.json["error"]["code"] == "invalid_api_key"
        assert with_key(stack, ALICE[:-1]).status == 401
        assert with_key(stack, ALICE).status == 200
        spoofed = {"x-autopoiesis-client": "bob"}
        seen = with_key(stack, ALICE, "/v1/embeddings", **spoofed).json["headers"]
        assert seen["x-autopoiesis-client"] == "alice"
        assert "authorization" not in {name.lower() for name in seen}


def test_a_key_has_its_own_rate(stack: Stack, tmp_path: Path):
    keys = key_file(tmp_path, f"alice {ALICE}", f"bob {BOB}")
    with changed(stack, api_keys=keys, requests_per_minute=3):
        assert [with_key(stack, ALICE).status for _ in range(3)] == [200] * 3
        limited = with_key(stack, ALICE)
        assert (limited.status, limited.headers["retry-after"]) == (429, "20")
        assert limited.json["error"]["code"] == "rate_limit_exceeded"
        assert with_key(stack, BOB).status == 200


def test_a_running_stream_goes_on_while_the_settings_change(stack: Stack, tmp_path: Path):
    answers: list[Answer] = []
    body = chat(stream=True, max_tokens=40, test={"each_s": 0.05})
    running = threading.Thread(target=lambda: answers.append(stack.post(body)))
    running.start()
    time.sleep(0.5)
    with changed(stack, api_keys=key_file(tmp_path, f"alice {ALICE}"), max_body_bytes=1 << 20):
        assert stack.post(chat()).status == 401
        assert not answers
        running.join()
        assert with_key(stack, ALICE).status == 200
    assert answers[0].body.count(b'"word "') == 40
    assert answers[0].body.endswith(b"[DONE]\n\n")


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def names(stack: Stack) -> bytes | None:
    """Return what certificate the gateway shows."""
    try:
        pem = ssl.get_server_certificate(("127.0.0.1", stack.port), timeout=5)
    except OSError:
        return None
    return ssl.PEM_cert_to_DER_cert(pem)


def test_tls_and_http2_are_spoken_and_a_renewed_certificate_is_taken_up(
    stack: Stack, tmp_path: Path
):
    cert, key = certificate(tmp_path, "first")
    with changed(stack, tls_cert=cert, tls_key=key):
        url = f"https://127.0.0.1:{stack.port}/v1/chat/completions"
        argv = ["curl", "-sk", "--http2", "-H", "content-type: application/json", url]
        argv += ["-d", json.dumps(chat(max_tokens=3)), "-w", "%{http_version} %{http_code}"]
        told = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout
        assert told.endswith("2 200")
        assert httpx.post(url, json=chat(), verify=False).status_code == 200
        first = names(stack)
        assert first
        assert b"first" in first
        new_cert, new_key = certificate(tmp_path, "second")
        new_key.replace(key)
        new_cert.replace(cert)
        wait_until(lambda: b"second" in (names(stack) or b""))


def test_http2_without_tls_is_spoken_too(stack: Stack):
    argv = ["curl", "-s", "--http2-prior-knowledge", f"http://127.0.0.1:{stack.port}/v1/models"]
    argv += ["-o", "/dev/null", "-w", "%{http_version} %{http_code}"]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout
    assert told == "2 200"


def test_a_smaller_body_limit_and_a_circuit_breaker(stack: Stack):
    with changed(stack, max_body_bytes=2048, most_requests=1, retries=0):
        assert stack.post(chat("x" * 4096)).status == 413
        slow = threading.Thread(target=lambda: stack.post(chat(test={"first_s": 0.8})))
        slow.start()
        time.sleep(0.3)
        broken = stack.post(chat())
        slow.join()
        assert (broken.status, broken.json["error"]["code"]) == (503, "no_replica")
        assert stack.post(chat()).status == 200


def test_a_client_that_is_too_slow_is_answered(stack: Stack):
    with changed(stack, request_timeout_s=0.5):

        def slowly() -> Iterator[bytes]:
            yield b'{"messages"'
            time.sleep(1.5)
            yield b": []}"

        url = f"http://127.0.0.1:{stack.port}/v1/chat/completions"
        answer = httpx.post(url, content=slowly(), timeout=10)
        assert answer.status_code == 408
        assert answer.json()["error"]["code"] == "request_timeout"


def test_a_wrong_change_changes_nothing(stack: Stack, tmp_path: Path):
    lonely, _ = certificate(tmp_path, "lonely")
    _, other = certificate(tmp_path, "other")
    with pytest.raises(EnvoyError, match="refuses its configuration"):
        change(stack, DataPlaneSettings(tls_cert=lonely, tls_key=other))
    with pytest.raises(EnvoyError, match="Cannot read"):
        change(stack, DataPlaneSettings(tls_cert=lonely, tls_key=tmp_path / "none"))
    assert stack.post(chat()).status == 200


@pytest.mark.parametrize(
    ("lines", "mode", "words"),
    [
        ([f"alice {ALICE}"], 0o644, "chmod 600"),
        ([""], 0o600, "no key"),
        (["alice"], 0o600, "line 1: a line is"),
        (["alice short"], 0o600, "at least 16"),
        (["", f"al/ice {ALICE}"], 0o600, "line 2: a name"),
        ([f"alice {ALICE} many"], 0o600, "whole number"),
        ([f"alice {ALICE}", f"bob {ALICE}"], 0o600, "there already"),
    ],
)
def test_a_wrong_file_of_keys_is_explained_without_telling_keys(
    tmp_path: Path, lines: list[str], mode: int, words: str
):
    with pytest.raises(KeyFileError, match=words) as told:
        read_keys(key_file(tmp_path, *lines, mode=mode))
    assert ALICE not in str(told.value)


def test_settings_that_do_not_fit_together_are_refused():
    for wrong in ({"tls_cert": "x"}, {"requests_per_minute": 5}, {"retries": 99}):
        with pytest.raises(ValueError, match="validation error"):
            DataPlaneSettings.model_validate(wrong)
