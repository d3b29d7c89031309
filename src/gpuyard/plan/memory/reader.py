"""The fields of a config.json by any of their names, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from gpuyard.spec.errors import RefusedError

_ABSURD = 2**53  # no whole number beyond this is exact in JSON
_MOST = {"hidden_size": 131_072, "num_hidden_layers": 1_000, "vocab_size": 4_000_000, "num_attention_heads": 4_096}
_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"),
    "num_key_value_heads": (
        "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num",
    ),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "intermediate_size": (
        "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "d_ff", "decoder_ffn_dim",
        "block_ff_dim",
    ),
    "max_position_embeddings": (
        "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length",
        "model_max_length", "max_target_positions",
    ),
    "experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts",
    ),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "shared_width": (
        "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim",
        "shared_intermediate_size",
    ),
    "dense_layers": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "expert_step": (
        "decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period", "moe_layer_interval",
        "moe_layer_freq",
    ),
    "latent_width": ("moe_latent_size", "routed_expert_hidden_size"),
    "groups": ("mamba_n_groups", "n_groups", "mamba_ngroups"),
}  # fmt: skip


def whole(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < _ABSURD and value == int(value)


def listed(value: object) -> list[int]:
    """The whole numbers of a list; none where it is no list."""
    return [item for item in cast("list[Any]", value) if whole(item)] if isinstance(value, list) else []


class Reader:
    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def number(self, key: str) -> int | None:
        """A whole number above nothing, by any of its names; None where it is not told."""
        for alias in _ALIASES.get(key, (key,)):
            value = self.config.get(alias)
            if isinstance(value, list) and value and all(map(whole, cast("list[Any]", value))):
                value = max(cast("list[int]", value))  # told layer by layer: the widest
            if value is None or isinstance(value, (list, dict)):
                continue
            if not whole(value):
                raise self.refused(alias, f"{value!r} is no whole number above 0", "set it as the model was trained")
            if int(value) > _MOST.get(key, _ABSURD):
                raise self.refused(alias, f"{value} is more than any model has", f"at most {_MOST[key]}")
            return int(value) or None
        return None

    def needed(self, key: str) -> int:
        value = self.number(key)
        if value is None:
            names = " or ".join(_ALIASES.get(key, (key,)))
            raise self.refused(key, "it is not there, or 0", f"add {names}")
        return value

    def refused(self, field: str, why: str, change: str) -> RefusedError:
        return RefusedError("FIT-CONFIG", f"{self.name}: {field}", why, change)
