"""Rooflines: shapes from configurations, coefficients from datasheets, and what is impossible."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopoiesis.twin.hardware import HardwareError, ModelShape, gpus, models, read_model
from autopoiesis.twin.latency import Profile, at_speed, profile, profiles, step_s
from autopoiesis.twin.roofline import composed, roofline

WORKED = ((1, 1024, 0), (32, 1024, 0), (128, 1024, 0), (0, 0, 2048), (0, 0, 8192), (32, 1024, 512))
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def steps_s(p: Profile) -> np.ndarray:
    c = at_speed(p.step, 1.0)
    return np.array(
        [
            step_s(c, d + k, d + (k > 0), d + (k > 0), d, d * context, k, 0.5 * k * k, 0)
            for d, context, k in WORKED
        ]
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # as their publishers count them
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("llama-3.2-1b", 1.24),
        ("llama-3.2-3b", 3.21),
        ("mistral-7b", 7.25),
        ("mistral-nemo-12b", 12.25),
        ("mixtral-8x7b", 46.70),
        ("mixtral-8x22b", 140.62),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.54),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-14b", 14.77),
        ("qwen2.5-32b", 32.76),
        ("qwen2.5-72b", 72.71),
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.72),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.77),
        ("qwen3-32b", 32.76),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.09),
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.83),
    ],
)
def test_models_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    assert models()[name].parameters / 1e9 == pytest.approx(billions, rel=0.006)


def test_every_row_has_a_source() -> None:
    assert all(row.source for row in (*gpus().values(), *models().values()))


@pytest.mark.parametrize("name", [name for name in profiles() if not name.startswith("cpu")])
def test_rooflines_are_near_the_composed_profiles(name: str) -> None:
    """docs/twin.md has the errors one by one; RTX cards come from another source."""
    ours, theirs = composed(name), profile(name)
    limit = 0.25 if name.startswith("rtx") else 0.16
    assert np.abs(steps_s(ours) / steps_s(theirs) - 1).max() < limit
    assert ours.kv_blocks == pytest.approx(theirs.kv_blocks, rel=0.05)
    if not name.startswith("rtx"):
        assert ours.max_num_batched_tokens == theirs.max_num_batched_tokens
    assert not ours.validated
    assert ours.source.startswith("roofline")


def test_built_in_names_come_first_and_others_are_composed() -> None:
    name = "h100-llama-3-8b-tp1-bf16"
    assert not profile(name).source.startswith("roofline")
    assert profile("l40s-qwen3-8b-tp1-fp8") == composed("l40s-qwen3-8b-tp1-fp8")
    assert (
        profile("a100-40-qwen3-8b-tp2-bf16").kv_blocks < profile("a100-qwen3-8b-tp2-bf16").kv_blocks
    )


def test_a_config_takes_the_place_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "my-tp2-model" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA))
    ours = profile(f"h100-{file}-tp2-bf16")
    assert ours.step == composed("h100-llama-3.1-8b-tp2-bf16").step
    assert ours.kv_blocks == composed("h100-llama-3.1-8b-tp2-bf16").kv_blocks
    assert ours.name == f"h100-{file}-tp2-bf16"


def test_a_text_config_within_is_read() -> None:
    outer = {"model_type": "vision", "text_config": LLAMA, "vision_config": {"hidden_size": 1}}
    assert ModelShape.from_config(outer, "m") == ModelShape.from_config(LLAMA, "m")


def test_experts_are_stored_whole_and_computed_in_part() -> None:
    mixtral = models()["mixtral-8x7b"]
    one_expert = replace(mixtral, experts=0, experts_per_token=0)
    gpu = gpus()["h200"]
    sparse, dense = roofline(gpu, mixtral, 2), roofline(gpu, one_expert, 2)
    assert mixtral.parameters > 6 * one_expert.parameters
    assert sparse.kv_blocks < dense.kv_blocks
    assert sparse.step.weights_s > 4 * dense.step.weights_s
    assert sparse.step.token_s < 2.2 * dense.step.token_s


def test_fp8_is_no_faster_to_compute_where_a_gpu_has_none() -> None:
    bf16, fp8 = composed("a100-qwen3-8b-tp1-bf16").step, composed("a100-qwen3-8b-tp1-fp8").step
    assert fp8.token_s == bf16.token_s
    assert fp8.weights_s < 0.6 * bf16.weights_s


def composed_or_refused(name: str) -> tuple[Profile | None, str]:
    try:
        return composed(name), ""
    except HardwareError as error:
        return None, str(error)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(gpus())),
    st.sampled_from(sorted(models())),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from(["bf16", "fp8", "int4"]),
)
def test_any_pair_gives_a_profile_or_one_sentence(
    gpu: str, model: str, tp: int, precision: str
) -> None:
    name = f"{gpu}-{model}-tp{tp}-{precision}"
    one, refusal = composed_or_refused(name)
    if one is None:
        assert refusal.startswith(name)
        assert "\n" not in refusal
        return
    assert one.name == name
    kv_bytes = one.kv_blocks * 16 * 4 * models()[model].layers * models()[model].head_dim
    assert kv_bytes < 0.9 * gpus()[gpu].memory_bytes * tp
    two, _ = composed_or_refused(f"{gpu}-{model}-tp{2 * tp}-{precision}")
    if two is None:
        return
    assert two.kv_blocks > one.kv_blocks
    # A small model gains nothing: what it saves in arithmetic goes into the all-reduce's latency.
    large = models()[model].hidden >= 4096
    assert not large or steps_s(two)[3] < steps_s(one)[3] or gpus()[gpu].link_gb_s < 100


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h1000", "no profile 'h1000'; give GPU-MODEL-tpN-PRECISION"),
        ("h9-llama-3-8b-tp1-bf16", "no such GPU; there are a10, a100"),
        ("h100-llama-9-tp1-bf16", "no such model; there are codellama-34b"),
        ("h100-llama-3-8b-tp1-fp4", "no precision 'fp4'; there are bf16, fp16, fp8, int4"),
        ("h100-llama-3-8b-tp0-bf16", "32 attention heads cannot be split over 0 GPUs"),
        ("h100-llama-3-8b-tp3-bf16", "32 attention heads cannot be split over 3 GPUs"),
        ("h100-qwen2.5-14b-tp5-bf16", "8 kv heads cannot be split over 5 GPUs"),
        ("h100-llama-3-70b-tp1-bf16", "weights take 141.1 GB and activations 3.5 GB"),
        ("h100-/nowhere/config.json-tp1-bf16", "/nowhere/config.json: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(name: str, says: str) -> None:
    with pytest.raises(HardwareError) as error:
        profile(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_the_share_of_memory_is_checked(share: float) -> None:
    with pytest.raises(HardwareError, match="memory_share"):
        roofline(gpus()["h100"], models()["qwen3-8b"], memory_share=share)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "has no `hidden_size`"),
        ({"hidden_size": "4096"}, "`hidden_size` is '4096'; it must be a whole number"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({"num_hidden_layers": 0}, "layers must be at least 1, got 0"),
        ({"num_key_value_heads": 5}, "heads (32) that its kv heads (5) divide"),
        ({"vocab_size": 0}, "needs a vocabulary"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "5 of 4 experts a token cannot be"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
        ({"interleave_moe_layer_step": 2}, "mixes layers with and without experts"),
    ],
)
def test_a_wrong_configuration_names_its_field(changes: dict[str, object], says: str) -> None:
    with pytest.raises(HardwareError) as error:
        ModelShape.from_config({**LLAMA, **changes}, "m")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(HardwareError) as error:
        read_model(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
