"""Starts that fail: the cause in one sentence, exit code 3, and no process left."""

import time
from contextlib import suppress

import psutil
import pytest
from conftest import SIZES
from gateway_process import run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def start(folder, vllm_python, model, *arguments):
    """Try to serve; return the exit code and the last line said."""
    control, port = "18081", "18080"
    options = [
        "--vllm",
        str(model),
        "--vllm-python",
        vllm_python,
        "--port",
        port,
        "--control-port",
        control,
    ]
    code, _, errors = run("serve", *options, "--", *arguments, cwd=folder, timeout=300)
    return code, errors.strip().splitlines()[-1]


def left_of(folder):
    """Return the processes that still run there; workers of a vLLM have no arguments to be known by."""
    time.sleep(1.0)
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it may end while we look, or be somebody else's
            if process.cwd() == str(folder):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("/nowhere/model", SIZES, "there is no model /nowhere/model"),
        (None, ["--max-num-sequences", "4"], "unrecognized arguments: --max-num-sequences"),
        (None, ["--tensor-parallel-size", "2"], "needs GPUs, and none are here"),
        (None, [*SIZES[:-4], "--kv-cache-memory-bytes", "1000000"], "the KV cache is too small"),
        (None, [*SIZES, "--port", "1"], "--port is set here"),
    ],
)
def test_the_cause_is_said(tmp_path, vllm_python, tiny_model, model, arguments, says):
    code, line = start(tmp_path, vllm_python, model or tiny_model, *arguments)

    assert 3 == code
    assert says in line
    assert not left_of(tmp_path)


def test_an_interpreter_without_vllm(tmp_path, tiny_model):
    code, line = start(tmp_path, "/usr/bin/python3", tiny_model, *SIZES)

    assert 3 == code
    assert "/usr/bin/python3 has no vLLM" in line
    assert not left_of(tmp_path)
