"""How a model's files are quantised, and what they say its cache is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def quantization(
    config: Mapping[str, Any], text: Mapping[str, Any]
) -> tuple[str | None, int | None, int | None, tuple[str, ...]]:
    quantization = _told(config, text)
    if quantization is None:
        return None, None, None, ()
    method = str(quantization.get("quant_method") or quantization.get("quant_algo") or "unknown").lower()
    layout = f"{quantization.get('quant_algo')} {quantization.get('format')}".lower()
    if method.startswith(("modelopt", "compressed-tensors")) and "fp4" in layout:
        method = "mxfp4" if "mxfp4" in layout else "nvfp4"
    bits, group = quantization.get("bits") or quantization.get("w_bit"), quantization.get("group_size")
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        first = next(iter(cast("Mapping[str, Any]", groups).values()))
        weights = first.get("weights") if isinstance(first, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(weights, Mapping):
            bits = weights.get("num_bits") or bits  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            group = weights.get("group_size") or group  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        bits = 4 if quantization.get("load_in_4bit") else 8
    listed = cast("object", quantization.get("ignore") or quantization.get("modules_to_not_convert"))
    left = [str(item) for item in cast("list[Any]", listed)] if isinstance(listed, list) else []
    parts = {"self_attn": "attention", "linear_attn": "attention", "experts": "experts", "mlp": "mlp"}
    kept = {part for word, part in parts.items() for item in left if word in item and "shared" not in item}
    kept |= {"shared" for item in left if "shared_expert" in item}
    # Names of single layers, as compressed-tensors lists them, say nothing of the kind as a whole.
    kept -= {"mlp", "experts"} if any("gate" in item or "router" in item for item in left) else set()
    if str(config.get("model_type", "")).startswith("gpt_oss"):
        kept |= {"attention"}
    whole = int(group) if isinstance(group, int) and group > 0 else None  # pyright: ignore[reportUnknownArgumentType]
    return method, int(bits) if isinstance(bits, int) else None, whole, tuple(sorted(kept))


def cache_dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    """What the files say the cache was calibrated for: vLLM takes it where it is not told another."""
    quantization = _told(config, text)
    if quantization is None:
        return None
    scheme = cast("object", quantization.get("kv_cache_scheme"))
    bits = cast("Mapping[str, Any]", scheme).get("num_bits") if isinstance(scheme, Mapping) else None
    return "fp8" if bits == 8 or str(quantization.get("kv_cache_quant_algo", "")).upper() == "FP8" else None


def _told(config: Mapping[str, Any], text: Mapping[str, Any]) -> Mapping[str, Any] | None:
    told = config.get("quantization_config") or text.get("quantization_config")
    return cast("Mapping[str, Any]", told) if isinstance(told, Mapping) else None
