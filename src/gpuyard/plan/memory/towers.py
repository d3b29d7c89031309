"""Parameters of what stands before a language model: towers that see or hear, and what joins them to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from gpuyard.plan.memory.reader import whole

_TOWERS = ("vision_config", "audio_config", "vision_encoder")
_POSITIONS = ("siglip_vision_model", "clip_vision_model", "internvl_vision")
"""Kinds that learn a position for each patch."""
_MOBILENET_300M = 294_000_000  # gemma3n's eye, whose config tells no widths


def towers_of(config: Mapping[str, Any], text: Mapping[str, Any], hidden: int) -> tuple[int, int, bool]:
    """Parameters that are sharded, those that each rank has whole, and whether there is a tower at all."""
    found = {
        key: _tower(cast("Mapping[str, Any]", text[key]), config, hidden)
        for key in _TOWERS
        if isinstance(text.get(key), Mapping)
    }
    # Mistral's own format keeps its tower whole on every rank.
    kept = found.get("vision_encoder", 0)
    return sum(found.values()) - kept, kept, bool(found)


def _tower(tower: Mapping[str, Any], config: Mapping[str, Any], hidden: int) -> int:
    def number(*names: str) -> int:
        values = [tower.get(name) for name in names]
        return next((int(value) for value in values if whole(value) and value), 0)

    kind, parent = str(tower.get("model_type", "")), str(config.get("model_type", ""))
    if "mobilenet" in str(tower.get("architecture", "")):
        return _MOBILENET_300M + number("hidden_size") * hidden
    width, depth = (
        number("embed_dim", "hidden_size", "vt_hidden_size", "d_model", "width"),
        number("num_hidden_layers", "vt_num_hidden_layers", "depth", "encoder_layers"),
    )
    if conformer := number("conf_num_hidden_layers"):
        # Two feed-forward parts of four widths, attention with relative positions, a convolution of three.
        return conformer * 24 * width * width + width * hidden
    depth += number("num_global_layers")
    inner = number("intermediate_size", "vt_intermediate_size", "encoder_ffn_dim")
    inner = inner or int(width * float(tower.get("mlp_ratio") or 4))
    gated = str(tower.get("hidden_act", "")) in ("silu", "swiglu") or kind == "gemma4_vision"
    matrices = 3 if gated else 2
    # Qwen2-VL calls the width of its eye embed_dim, and that of what comes out hidden_size.
    out = number("out_hidden_size", "output_dim") or (number("hidden_size") if "embed_dim" in tower else 0) or hidden
    block = 4 * width * width + matrices * width * (out if kind.startswith("glm4v") else inner)
    patch = _one(tower.get("patch_size")) or 0
    patches = 3 * patch * patch * (number("temporal_patch_size") or 1)
    side = _one(tower.get("image_size"))
    places = number("num_position_embeddings") or 2 * number("position_embedding_size")
    if kind in _POSITIONS and patch and side:
        places = (side // patch) ** 2
    return depth * block + width * (patches + places) + _joint(tower, config, (kind, parent), width, inner, out)


def _joint(
    tower: Mapping[str, Any], config: Mapping[str, Any], kinds: tuple[str, str], width: int, inner: int, out: int
) -> int:
    """What makes the language model's tokens of the tower's; a model may have further ones for what it takes midway."""
    kind, parent = kinds
    side = _one(tower.get("spatial_merge_size")) or _one(config.get("spatial_merge_size"))
    merged = width * (side or 2) ** 2
    if parent.startswith(("gemma3", "gemma4", "paligemma")):
        return width * out
    if kind.startswith("glm4v"):
        return merged * out + out * out + 3 * out * inner
    if aligned := _one(config.get("alignment_intermediate_size")):
        return merged * aligned + aligned // 2 * out
    if parent.startswith(("internvl", "voxtral")):
        return merged * out + out * out
    if parent == "mistral3":
        return merged * width + width * out + out * out
    if parent.startswith("llava"):
        return width * out + out * out
    halfway = tower.get("deepstack_visual_indexes")
    joints = 1 + (len(cast("list[Any]", halfway)) if isinstance(halfway, list) else 0)
    return joints * ((merged if side else width * 2) ** 2 + merged * out)


def _one(value: object) -> int:
    """A whole number, or the first of a list of them; 0: neither."""
    first = cast("list[object]", value)[0] if isinstance(value, list) and value else cast("object", value)
    return int(cast("int", first)) if whole(first) else 0
