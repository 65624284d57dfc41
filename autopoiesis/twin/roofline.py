"""A fallback profile for any model on any GPU, from configuration figures alone.

Each coefficient of the step model is bytes over bandwidth or operations over rate, divided by an
efficiency, plus a fixed time per layer. The efficiencies are fitted to the profiles that were
composed from measured kernels (`benchmarks/roofline.py` fits them and prints what is left).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autopoiesis.twin.hardware import Gpu, HardwareError, ModelShape, gpus, models, read_model
from autopoiesis.twin.latency import Profile, StepModel

BLOCK_TOKENS = 16
MEMORY_SHARE = 0.90
"""vLLM's `--gpu-memory-utilization`."""
KV_VALUE_BYTES = 2
"""The KV cache is kept in 16 bits, whatever the weights."""
SET_ASIDE_BYTES, SET_ASIDE_TOKEN_BYTES = 1.1e9, 0.29e6
"""Activations, graphs and workspace [bytes], and what more per token of a step: 1.7 GB at 2,048
tokens as measured on an RTX 4090, 3.5 GB at 8,192 as the composed profiles assume."""
ROUTED_TOKENS = 32
"""Tokens of the step for which it is counted how many experts' weights are read."""

HOST_S, HOST_SEQUENCE_S = 3e-4, 5e-6
MIXED_CONTEXT, MIXED_SEQUENCE_S = 1.5, 1e-5
"""How much dearer decode attention is beside prefill; assumed, as in the composed profiles."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a GPU reaches of its datasheet, and what layers cost besides."""

    weights: float
    """Share of the bandwidth that reading weights reaches."""
    compute: float
    """Share of the bf16 rate that matrix products reach."""
    compute_fp8: float
    """Share of the fp8 rate."""
    kv: float
    """Share of the bandwidth that reading the KV cache reaches."""
    pair: float
    """Share of the bf16 rate that prefill attention reaches."""
    head: float
    """Share of the bandwidth that reading the output head reaches."""
    link: float
    """Share of the link that all-reduce reaches."""
    elementwise: float
    """Share of the bandwidth that norms, activation and rotary reach."""
    prefill: float
    """Bytes moved by prefill attention, in queries per layer and token."""
    layer_s: float
    """Small kernels of one layer."""
    allreduce_s: float
    """Latency of one all-reduce; there are two a layer."""
    decode_layer_s: float
    decode_head_s: float
    """Decode attention per sequence, layer and head of one GPU."""
    mixed_layer_s: float
    knee: float
    """Sharpness on one GPU in bf16."""
    knee_parallel: float
    """It falls with this power of the tensor-parallel degree."""
    knee_fp8: float
    """Factor on it for fp8."""


FITTED = Efficiency(
    weights=0.801,
    compute=0.789,
    compute_fp8=0.649,
    kv=0.886,
    pair=0.696,
    head=0.588,
    link=0.891,
    elementwise=0.644,
    prefill=6.32,
    layer_s=3.17e-05,
    allreduce_s=2.69e-06,
    decode_layer_s=1.38e-05,
    decode_head_s=2.94e-09,
    mixed_layer_s=1.25e-05,
    knee=2.85,
    knee_parallel=0.343,
    knee_fp8=0.716,
)

_WEIGHT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int4": 0.5 + 2.0 / 128}
"""Bytes of one weight of a layer; int4 has a 16-bit scale per 128. Embeddings stay in 16 bits."""


def roofline(
    gpu: Gpu,
    model: ModelShape,
    tensor_parallel: int = 1,
    precision: str = "bf16",
    *,
    memory_share: float = MEMORY_SHARE,
    name: str = "",
) -> Profile:
    """Return the profile of a model on a GPU, or on `tensor_parallel` of them.

    Raises:
        HardwareError: the model cannot be split so, does not fit, or the precision is unknown.
    """
    name = name or f"{gpu.name}-{model.name}-tp{tensor_parallel}-{precision}"
    _refuse_impossible_split(name, model, tensor_parallel)
    if precision not in _WEIGHT_BYTES:
        raise HardwareError(
            f"{name}: no precision {precision!r}; there are {', '.join(_WEIGHT_BYTES)}"
        )
    if not 0.0 < memory_share <= 1.0:
        raise HardwareError(f"{name}: memory_share must be within (0, 1], got {memory_share}")
    budget = step_tokens(gpu)
    return Profile(
        name=name,
        step=step_model(gpu, model, tensor_parallel, precision),
        kv_blocks=_kv_blocks(name, gpu, model, tensor_parallel, precision, memory_share, budget),
        max_num_seqs=256,
        max_num_batched_tokens=budget,
        source=f"roofline: {gpu.name} ({gpu.source}); {model.name} ({model.source}); efficiencies "
        "fitted to the profiles composed from measured kernels",
        validated=False,
        check="none; docs/twin.md tells how far rooflines are from the composed profiles",
        kv_block_tokens=BLOCK_TOKENS,
    )


def step_tokens(gpu: Gpu) -> int:
    """Return vLLM's default token budget of a step: more on large GPUs that are no A100."""
    large = gpu.memory_mib >= 70 * 1024 and not gpu.name.startswith("a100")
    return 8192 if large else 2048


def step_model(
    gpu: Gpu,
    model: ModelShape,
    tensor_parallel: int,
    precision: str,
    reached: Efficiency = FITTED,
) -> StepModel:
    """Return the coefficients, the weights and the work shared by `tensor_parallel` GPUs."""
    tp, layers = tensor_parallel, model.layers
    bandwidth, bf16, link = gpu.bandwidth_gb_s * 1e9, gpu.bf16_tflops * 1e12, gpu.link_gb_s * 1e9
    in_fp8 = precision == "fp8" and gpu.fp8_tflops is not None
    rate = reached.compute * bf16
    if in_fp8 and gpu.fp8_tflops is not None:
        rate = reached.compute_fp8 * gpu.fp8_tflops * 1e12
    heads = model.heads / tp
    hidden_bytes, query_bytes = 2 * model.hidden, 2 * heads * model.head_dim
    elementwise_bytes = 8 * hidden_bytes + 3 * 2 * _width(model) / tp
    read = layers * model.layer_parameters(_experts_read(model)) * _WEIGHT_BYTES[precision] / tp
    multiplied = layers * model.layer_parameters(model.experts_per_token) / tp
    reduces = 2 * layers if tp > 1 else 0
    reduced_bytes = reduces * 2 * (tp - 1) / tp * hidden_bytes
    knee = reached.knee * tp**-reached.knee_parallel * (reached.knee_fp8 if in_fp8 else 1.0)
    decode_s = layers * reached.decode_layer_s
    decode_context_s = _kv_token_bytes(model, tp) / (reached.kv * bandwidth)
    decode_sequence_s = layers * heads * reached.decode_head_s
    return StepModel(
        weights_s=read / (reached.weights * bandwidth)
        + layers * reached.layer_s
        + reduces * reached.allreduce_s,
        token_s=2 * multiplied / rate
        + layers * elementwise_bytes / (reached.elementwise * bandwidth)
        + reduced_bytes / (reached.link * link),
        knee=max(knee, 1.0),
        head_s=2 * model.head_parameters / tp / (reached.head * bandwidth),
        head_sequence_s=0.0,
        host_s=HOST_S,
        host_sequence_s=HOST_SEQUENCE_S,
        decode_s=decode_s,
        decode_context_token_s=decode_context_s,
        decode_sequence_s=decode_sequence_s,
        mixed_s=layers * reached.mixed_layer_s,
        mixed_decode_s=decode_s,
        mixed_context_token_s=MIXED_CONTEXT * decode_context_s,
        mixed_sequence_s=decode_sequence_s + MIXED_SEQUENCE_S,
        prefill_token_s=layers * reached.prefill * query_bytes / bandwidth,
        prefill_pair_s=4 * layers * heads * model.head_dim / (reached.pair * bf16),
        prefill_cached_token_s=0.0,
    )


def _experts_read(model: ModelShape) -> float:
    """Return how many experts `ROUTED_TOKENS` tokens take, chosen evenly."""
    if not model.experts:
        return 1.0
    missed = (1.0 - model.experts_per_token / model.experts) ** ROUTED_TOKENS
    return model.experts * (1.0 - missed)


def _width(model: ModelShape) -> int:
    """Return how wide a token's feed-forward layer is, all its experts together."""
    return model.intermediate * max(model.experts_per_token, 1) + model.shared_intermediate


def _kv_token_bytes(model: ModelShape, tp: int) -> float:
    """Return the KV cache of one token on one GPU; heads are doubled where there are too few."""
    return 2 * KV_VALUE_BYTES * model.layers * max(model.kv_heads / tp, 1.0) * model.head_dim


def _kv_blocks(
    name: str,
    gpu: Gpu,
    model: ModelShape,
    tp: int,
    precision: str,
    memory_share: float,
    budget_tokens: int,
) -> int:
    embeddings = model.head_parameters * (1 if model.tied else 2)
    in_layers = model.parameters - embeddings
    weights = (in_layers * _WEIGHT_BYTES[precision] + 2 * embeddings) / tp
    set_aside = SET_ASIDE_BYTES + SET_ASIDE_TOKEN_BYTES * budget_tokens
    left = memory_share * gpu.memory_bytes - weights - set_aside
    blocks = int(left // (BLOCK_TOKENS * _kv_token_bytes(model, tp)))
    if blocks < 1:
        raise HardwareError(
            f"{name}: does not fit: of the {memory_share * gpu.memory_bytes / 1e9:.1f} GB of a GPU "
            f"({memory_share:.0%} of its memory) weights take {weights / 1e9:.1f} GB and "
            f"activations {set_aside / 1e9:.1f} GB; take more GPUs, larger ones or fewer bits"
        )
    return blocks


def _refuse_impossible_split(name: str, model: ModelShape, tp: int) -> None:
    if tp < 1 or model.heads % tp:
        raise HardwareError(
            f"{name}: {model.heads} attention heads cannot be split over {tp} GPUs; "
            "tp must divide them"
        )
    if model.kv_heads % tp and tp % model.kv_heads:
        raise HardwareError(
            f"{name}: {model.kv_heads} kv heads cannot be split over {tp} GPUs; "
            "tp must divide them, or they must divide tp"
        )


# --- names ------------------------------------------------------------------------------------

_NAME = re.compile(r"(?P<gpu_and_model>.+)-tp(?P<tp>\d{1,4})-(?P<precision>[a-z]+\d+)")


def composed(name: str, others: Sequence[str] = ()) -> Profile:
    """Return the roofline that a name `GPU-MODEL-tpN-PRECISION` asks for.

    MODEL is a known model, or the path of a `config.json` (it ends so, or has a slash in it).
    `others` are the names of profiles that there are besides.

    Raises:
        HardwareError: the name is of another form, or the profile is impossible.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise HardwareError(
            f"no profile {name!r}; give GPU-MODEL-tpN-PRECISION for a roofline, as in "
            f"l40s-qwen3-8b-tp1-bf16, or one of {', '.join(others)}"
        )
    both = match["gpu_and_model"]
    # The longest name that fits: a100-40 is a GPU, though a100 is one too.
    gpu = max((g for g in gpus() if both.startswith(f"{g}-")), key=len, default=None)
    if gpu is None:
        raise HardwareError(f"{name}: no such GPU; there are {', '.join(gpus())}")
    return roofline(
        gpus()[gpu],
        _model(name, both.removeprefix(f"{gpu}-")),
        int(match["tp"]),
        match["precision"],
        name=name,
    )


def _model(name: str, wanted: str) -> ModelShape:
    if "/" in wanted or wanted.endswith(".json"):
        return read_model(Path(wanted))
    if wanted not in models():
        raise HardwareError(
            f"{name}: no such model; there are {', '.join(models())}, or give the path of a "
            "config.json in its place"
        )
    return models()[wanted]
