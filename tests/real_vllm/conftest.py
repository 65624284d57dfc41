"""Two real vLLM replicas on the CPU behind `serve`, once for all tests here."""

import os
import subprocess
from pathlib import Path

import pytest
from gateway_process import serving

ASK_FOR_IT = "set AUTOPOIESIS_VLLM_PYTHON to an interpreter with vLLM; tests/real_vllm/install.sh DIRECTORY makes one"
SIZES = [
    "--dtype",
    "float32",
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "16",
    "--enforce-eager",
]
SIZES += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "tiny"]


@pytest.fixture(scope="session")
def vllm_python():
    python = os.environ.get("AUTOPOIESIS_VLLM_PYTHON")
    if not python:
        pytest.skip(ASK_FOR_IT)
    return python


@pytest.fixture(scope="session")
def tiny_model(vllm_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([vllm_python, Path(__file__).with_name("tiny_model.py"), folder], check=True)
    return folder


@pytest.fixture(scope="module")
def fleet(vllm_python, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    options = ["--vllm", str(tiny_model), "--replicas", "2", "--vllm-python", vllm_python]
    options += ["--window", "2", "--synthesizer", "none", "--", *SIZES]
    options += ["--scheduling-policy", "priority"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # on a CPU: sleep without --enable-sleep-mode
        with serving(folder, *options, start_limit_s=400) as gateway:
            yield gateway
