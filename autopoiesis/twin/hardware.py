"""What a roofline is made from: the shape of a model, and the datasheet of a GPU.

`hardware.json` has common ones, each with its source; a model's shape is also read from the
`config.json` that lies beside its weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

MIB = 1 << 20

_NOT_GATED = frozenset({"gpt_neox", "nemotron", "phi", "starcoder2"})
"""Model types whose feed-forward layers have two matrices; all others have three."""
_PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class HardwareError(ValueError):
    """A model or a GPU that no roofline can be made for; one sentence says why."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's datasheet; floating-point rates are dense, without sparsity."""

    name: str
    memory_mib: int
    bandwidth_gb_s: float
    bf16_tflops: float
    fp8_tflops: float | None
    """None: weights in fp8 are computed in bf16."""
    link_gb_s: float
    """To the other GPUs of a server, one way."""
    source: str

    @property
    def memory_bytes(self) -> int:
        """Return the size of its memory."""
        return self.memory_mib * MIB


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer; `experts` is 0 for a dense one."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of a feed-forward layer, or of one expert."""
    vocabulary: int
    tied: bool = False
    """Whether the embedding is also the output head."""
    experts: int = 0
    experts_per_token: int = 0
    shared_intermediate: int = 0
    """Width of the experts that every token takes, together."""
    mlp_matrices: int = 3
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate"):
            if getattr(self, field) < 1:
                raise HardwareError(
                    f"{self.name}: {field} must be at least 1, got {getattr(self, field)}"
                )
        if self.vocabulary < 1 or self.heads % self.kv_heads:
            raise HardwareError(
                f"{self.name}: needs a vocabulary and heads ({self.heads}) that its kv heads "
                f"({self.kv_heads}) divide"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise HardwareError(
                f"{self.name}: {self.experts_per_token} of {self.experts} experts a token "
                "cannot be; give 1 to all of them"
            )

    @property
    def attention_parameters(self) -> int:
        """Return the parameters of one layer's attention."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * queries + 2 * keys)

    @property
    def expert_parameters(self) -> int:
        """Return the parameters of one feed-forward layer, or of one expert."""
        return self.mlp_matrices * self.hidden * self.intermediate

    @property
    def shared_parameters(self) -> int:
        """Return what else a layer has that every token takes: shared experts and the router."""
        router = self.hidden * self.experts
        return self.mlp_matrices * self.hidden * self.shared_intermediate + router

    def layer_parameters(self, experts: float) -> float:
        """Return a layer's parameters, counting so many experts (1: the dense one)."""
        used = experts if self.experts else 1.0
        return self.attention_parameters + self.shared_parameters + used * self.expert_parameters

    @property
    def head_parameters(self) -> int:
        """Return the parameters of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Return all parameters, norms and biases left out."""
        embeddings = self.head_parameters * (1 if self.tied else 2)
        return round(self.layers * self.layer_parameters(self.experts)) + embeddings

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str, source: str = "") -> "ModelShape":
        """Read the fields of a Hugging Face configuration; of its `text_config` if it has one.

        Sliding windows are taken as full attention.

        Raises:
            HardwareError: a field is missing or wrong, or the model is of another kind.
        """
        text = cast("Mapping[str, Any]", config.get("text_config") or {})
        fields: dict[str, Any] = {**config, **text}
        _refuse_other_kinds(fields, name)

        def size(*names: str, default: int | None = None) -> int:
            for field in names:
                value = fields.get(field)
                if value is not None:
                    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                        raise HardwareError(
                            f"{name}: `{field}` is {value!r}; it must be a whole number"
                        )
                    return value
            if default is None:
                raise HardwareError(
                    f"{name}: has no `{names[0]}`; give the config.json of a decoder-only model"
                )
            return default

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        experts = size("num_experts", "num_local_experts", "n_routed_experts", default=0)
        wide = ("moe_intermediate_size", "intermediate_size") if experts else ("intermediate_size",)
        intermediate = size(*wide)
        shared = size("n_shared_experts", default=0) * intermediate if experts else 0
        return cls(
            name=name,
            layers=size("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=size("num_key_value_heads", default=heads),
            head_dim=size("head_dim", default=hidden // max(heads, 1)),
            intermediate=intermediate,
            vocabulary=size("vocab_size"),
            tied=fields.get("tie_word_embeddings") is True,
            experts=experts,
            experts_per_token=size("num_experts_per_tok", "experts_per_token") if experts else 0,
            shared_intermediate=size("shared_expert_intermediate_size", default=shared),
            mlp_matrices=2 if fields.get("model_type") in _NOT_GATED else 3,
            source=source,
        )


def _refuse_other_kinds(fields: Mapping[str, Any], name: str) -> None:
    if fields.get("kv_lora_rank"):
        raise HardwareError(
            f"{name}: has multi-head latent attention (`kv_lora_rank`), which no roofline here "
            "knows; calibrate a profile instead"
        )
    kinds = {str(kind) for kind in cast("list[object]", fields.get("layer_types") or [])}
    if other := sorted(kinds - _PLAIN_LAYERS):
        raise HardwareError(
            f"{name}: has layers of {', '.join(other)}, which no roofline here knows; "
            "calibrate a profile instead"
        )
    for field in ("decoder_sparse_step", "interleave_moe_layer_step"):
        if (fields.get(field) or 1) != 1:
            raise HardwareError(
                f"{name}: mixes layers with and without experts (`{field}` is {fields[field]}), "
                "which no roofline here knows; calibrate a profile instead"
            )


def read_model(path: Path) -> ModelShape:
    """Read a model's `config.json`; a HardwareError names the file and what is wrong."""
    try:
        config: Any = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise HardwareError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise HardwareError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise HardwareError(f"{path}: must be a JSON object, as a model's config.json is")
    return ModelShape.from_config(cast("dict[str, Any]", config), str(path), f"{path}")


@cache
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    text = resources.files("autopoiesis.twin").joinpath("hardware.json").read_text("utf-8")
    return json.loads(text)


@cache
def gpus() -> dict[str, Gpu]:
    """Return the GPUs that are known, by name."""
    return {name: Gpu(name, **row) for name, row in _tables()["gpus"].items()}


@cache
def models() -> dict[str, ModelShape]:
    """Return the models that are known, by name."""
    return {
        name: ModelShape.from_config(row, name, row["source"])
        for name, row in _tables()["models"].items()
    }
