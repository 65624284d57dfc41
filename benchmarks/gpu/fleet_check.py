"""Real vLLM replicas on one GPU: what changes take, what arms are worth, and how true the twin is.

    python benchmarks/gpu/fleet_check.py --vllm-python PYTHON --out DIR
    python benchmarks/gpu/fleet_check.py --vllm-python PYTHON --out DIR --tiny      # dry run on a CPU

Four replicas of a model with the shape of an 8B Llama and dummy weights share one card (`--replicas`,
`--memory` of it in all). Nothing is downloaded: the configuration and a tokenizer are made on the spot.

1. *Changes*: rolling restart with other limits, stop and start, sleep and wake of one replica, each through
   `autopoiesis control`, under light load; their phases are read from the `reconfigurations` table.
2. *Arms*: each human arm gets all traffic for a while (`control allocate`), then the living system (`control
   release`), the same part of each trace every time (`autopoiesis load`), in two rounds of opposite order.
3. *Twin*: `autopoiesis twin validate` calibrates the GPU's profile on half of what was recorded and tells its
   errors on the rest; `twin calibrate` writes the profile.

DIR gets `figures.json`, `figures.md` (the table for docs/), `profile.json` and the instance's data.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autopoiesis.arms.seeds import seed_arms
from autopoiesis.replicas.fleet import free_ports
from autopoiesis.twin.trace import Trace, read_trace, write_trace

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "autopoiesis"]
START_S = 1800.0
ARMS = (
    "round-robin",
    "random",
    "least-requests",
    "least-tokens",
    "least-kv",
    "power-of-two",
    "prefix-affinity",
    "session-affinity",
    "least-predicted-ttft",
    "weighted-scorer",
)
LIVING = "living system"
TOKENIZED = 3
"""Tokens of the made-up tokenizer for each of the load generator's."""
SHOWN = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p99_s")

MODEL = """
import sys
sys.path.insert(0, sys.argv[1])
from tiny_model import tokenizer
from transformers import GenerationConfig, LlamaConfig
words = tokenizer()
ids = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
words.save_pretrained(sys.argv[2])
GenerationConfig(**ids).save_pretrained(sys.argv[2])
LlamaConfig(
    vocab_size=len(words), hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", **ids,
).save_pretrained(sys.argv[2])
"""
"""Makes a model folder without weights; run by the interpreter that has vLLM."""


def make_model(python: str, folder: Path, tiny: bool) -> None:
    """Make the model: with random weights if it is tiny, else its shape only."""
    tools = ROOT / "tests" / "real_vllm"
    if (folder / "config.json").exists():
        return
    if tiny:
        subprocess.run([python, tools / "tiny_model.py", folder], check=True)
    else:
        subprocess.run([python, "-c", MODEL, tools, folder], check=True)


def vllm_arguments(options: argparse.Namespace) -> list[str]:
    """Return what each vLLM server is started with."""
    common = ["--served-model-name", "shaped", "--scheduling-policy", "priority"]
    common += ["--max-num-seqs", str(options.max_num_seqs), "--max-model-len", str(options.longest)]
    if options.tiny:
        sizes = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
        return common + sizes
    share = f"{options.memory / options.replicas:.3f}"
    common += ["--load-format", "dummy", "--gpu-memory-utilization", share, "--enable-sleep-mode"]
    return common + (["--enforce-eager"] if options.eager else [])


def cut(path: Path, options: argparse.Namespace, target: Path) -> None:
    """Write the part of a trace that is replayed: what the model can take, for so many seconds."""
    trace: Trace = read_trace(path)
    fits = trace.input_tokens + trace.output_tokens < options.longest // TOKENIZED // 2
    trace = trace.select(np.flatnonzero(fits)).speed(options.speed).slice(0.0, options.seconds)
    if not len(trace):
        sys.exit(
            f"{path} has no request in that time that the model can take; name another --trace"
        )
    rate = len(trace) / options.seconds
    if rate > options.most_rps:
        rows = np.sort(
            np.random.default_rng(0).permutation(len(trace))[
                : int(options.most_rps * options.seconds)
            ]
        )
        trace = trace.select(rows)
    write_trace(trace, target)


class Instance:
    """A running `autopoiesis serve`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = options.out
        self.port, self.control_port = free_ports(2)
        (self.folder / "serve.toml").write_text(
            f'window_s = {options.window}\nsynthesizer = "genetic"\n'
            f"slo_ttft_s = {options.slo_ttft}\nslo_tpot_s = {options.slo_tpot}\n"
        )
        argv = [*COMMAND, "serve", "--config", "serve.toml", "--data-dir", "data"]
        argv += ["--port", str(self.port), "--control-port", str(self.control_port)]
        argv += ["--profile", options.profile, "--vllm", str(options.model)]
        argv += ["--replicas", str(options.replicas), "--vllm-python", options.vllm_python]
        argv += ["--", *vllm_arguments(options)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        with (self.folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv, cwd=self.folder, stdout=log, stderr=log, env=os.environ | offline
            )

    def wait(self) -> None:
        """Wait until it serves."""
        log = self.folder / "serve.log"
        until_s = time.monotonic() + START_S
        while "control API" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > until_s:
                sys.exit(log.read_text())
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop it as an operator would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(180)

    def ask(self, *words: str) -> Any:
        """Run a command on it; return its JSON."""
        done = subprocess.run(
            [*COMMAND, *words], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"autopoiesis {' '.join(words)}: {done.stderr}")
        return json.loads(done.stdout or "null")

    def order(self, *words: str) -> None:
        """Give an order and say so."""
        print("control", *words, flush=True)
        self.ask("control", *words, "--data-dir", "data", "--json", "-")

    def load(self, trace: Path, for_s: float) -> dict[str, Any]:
        """Send a trace; return the summary."""
        url = f"http://127.0.0.1:{self.port}"
        words = ("load", str(trace), "--url", url, "--for", str(for_s), "--json", "-", "--quiet")
        return self.ask(*words)

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Ask the telemetry."""
        return self.ask("sql", query, "--data-dir", "data", "--format", "json")


def try_changes(instance: Instance, trace: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Change replicas, the first time under load; return what that took and whether anybody felt it."""
    sent: list[dict[str, Any]] = []
    restarted = threading.Event()

    def ask() -> None:
        while not restarted.is_set():
            sent.append(instance.load(trace, options.seconds))

    load = threading.Thread(target=ask)
    load.start()
    try:
        instance.order("restart", "--max-num-seqs", str(options.max_num_seqs // 2))
    finally:
        restarted.set()
        load.join()
    instance.order("stop", "replica-1")
    instance.order("start", "replica-1")
    if not options.tiny:
        instance.order("sleep", "replica-1")
        instance.order("wake", "replica-1")
    instance.order("restart", "--max-num-seqs", str(options.max_num_seqs))
    time.sleep(2 * options.window + 2)
    return {
        "load_during_the_restart": sent,
        "changes": instance.rows("select * from reconfigurations order by began_s"),
    }


def try_arms(
    instance: Instance, traces: Sequence[Path], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Serve every trace by every arm, and by the living system."""
    arms = [a for a in (options.arm or ARMS) if a in {arm.name for arm in seed_arms()}]
    figures: list[dict[str, Any]] = []
    for round_number in range(options.rounds):
        order = [*arms, LIVING]
        for arm in order if round_number % 2 == 0 else order[::-1]:
            instance.order("release") if arm == LIVING else instance.order("allocate", arm)
            for trace in traces:
                summary = instance.load(trace, options.seconds)
                figures.append({"arm": arm, "round": round_number, **summary})
                print(arm, trace.stem, {k: summary.get(k) for k in SHOWN}, flush=True)
    instance.order("release")
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown for docs/."""
    lines = [f"{figures['what']}, {figures['date']}", ""]
    names = ("action", "replica", "seconds", "drain_s", "import_s", "load_s", "compile_s", "capture_s",
             "engine_s", "warmup_s")  # fmt: skip
    lines += [
        "| " + " | ".join(n.removesuffix("_s") for n in names) + " |",
        "| --- " * len(names) + "|",
    ]
    for change in figures["changes"]["changes"]:
        cells = [f"{v:.1f}" if isinstance(v := change[n], float) else str(v) for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    during = figures["changes"]["load_during_the_restart"]
    asked, failed = (sum(load[name] for load in during) for name in ("requests", "failed"))
    worst_s = max((load["ttft_p99_s"] or 0.0 for load in during), default=0.0)
    lines += [
        "",
        f"Failed during the rolling restart: {failed} of {asked}, p99 TTFT {worst_s:.3f} s at most.",
    ]
    lines += [
        "",
        "| trace | arm | " + " | ".join(SHOWN) + " | failed |",
        "| --- " * (len(SHOWN) + 3) + "|",
    ]
    runs = figures["arms"]
    for trace in dict.fromkeys(run["trace"] for run in runs):
        for arm in dict.fromkeys(run["arm"] for run in runs):
            of_arm = [r for r in runs if (r["trace"], r["arm"]) == (trace, arm)]
            means = [np.mean([r[n] for r in of_arm if r[n] is not None]) for n in SHOWN]
            failed = sum(r["failed"] for r in of_arm)
            lines.append(
                f"| {trace} | {arm} | " + " | ".join(f"{m:.3f}" for m in means) + f" | {failed} |"
            )
    lines += ["", "Twin: " + json.dumps(figures["twin"].get("median_error", figures["twin"]))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="dry run: a tiny model on a CPU")
    parser.add_argument("--replicas", type=int, help="[4; 2 in a dry run]")
    parser.add_argument(
        "--memory", type=float, default=0.9, help="share of the card for all replicas"
    )
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture graphs")
    parser.add_argument("--max-num-seqs", type=int, help="[64; 16 in a dry run]")
    parser.add_argument("--longest", type=int, help="longest context [16384; 2048 in a dry run]")
    parser.add_argument("--trace", type=Path, action="append")
    parser.add_argument(
        "--arm", action="append", help="human arms to try; repeatable [ten of them]"
    )
    parser.add_argument("--rounds", type=int, help="[2; 1 in a dry run]")
    parser.add_argument("--seconds", type=float, help="of a trace under each arm [60; 10]")
    parser.add_argument("--speed", type=float, help="of the traces [1; 20 in a dry run]")
    parser.add_argument("--most-rps", type=float, help="requests per second at most [40; 4]")
    parser.add_argument("--window", type=float, default=5.0)
    parser.add_argument("--slo-ttft", type=float, default=1.0)
    parser.add_argument("--slo-tpot", type=float, default=0.1)
    parser.add_argument("--profile", default="h100-llama-3-8b-tp1-bf16")
    options = parser.parse_args()
    defaults = {"replicas": (4, 2), "max_num_seqs": (64, 16), "longest": (16384, 2048),
                "rounds": (2, 1), "seconds": (60.0, 10.0), "most_rps": (40.0, 4.0), "speed": (1.0, 20.0)}  # fmt: skip
    for name, values in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.tiny])
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    options.model = options.out / "model"
    make_model(options.vllm_python, options.model, options.tiny)
    chosen = options.trace or [
        ROOT / "traces" / f"{name}.parquet" for name in ("azure2023_conv_a", "azure2023_code_a")
    ]
    traces = [options.out / path.name for path in chosen]
    for path, target in zip(chosen, traces, strict=True):
        cut(path, options, target)
    instance = Instance(options)
    figures: dict[str, Any] = {
        "what": f"{options.replicas} replicas, vLLM arguments {' '.join(vllm_arguments(options))}",
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        instance.wait()
        figures["changes"] = try_changes(instance, traces[0], options)
        figures["arms"] = try_arms(instance, traces, options)
        time.sleep(2 * options.window + 2)
        limits = ("--data-dir", "data", "--max-num-seqs", str(options.max_num_seqs), "--json", "-")
        turns = ("--turns", str(options.seconds))
        figures["twin"] = instance.ask("twin", "validate", *turns, *limits, "--quiet")
        instance.ask("twin", "calibrate", "--out", "profile.json", *limits, "--quiet")
    finally:
        instance.stop()
        (options.out / "figures.json").write_text(json.dumps(figures, indent=2))
    (options.out / "figures.md").write_text(table(figures))
    print(table(figures))


if __name__ == "__main__":
    main()
