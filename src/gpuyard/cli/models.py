"""A model as a user names it: the ID of one that the catalog knows, a config.json, or a directory with its files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from gpuyard.catalog.memory import load_shapes
from gpuyard.plan import names
from gpuyard.plan.memory.cases import base_name
from gpuyard.plan.memory.config import shape_of
from gpuyard.plan.memory.shape import Shape
from gpuyard.spec.errors import RefusedError

_VALUE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LARGEST_HEADER = 100_000_000  # bytes; safetensors itself allows no more


def model_shape(word: str) -> Shape:
    """The shape of the model. Raises RefusedError: FIT-MODEL with the nearest, FIT-CONFIG, FIT-FILES."""
    path = Path(word)
    if path.is_dir():
        shape = _from_config(path / "config.json", path.name or word)
        sums = [_tensors(file) for file in sorted(path.glob("*.safetensors"))]
        files = sum(values for values, _ in sums), sum(others for _, others in sums)
        return replace(shape, files=files if sums else None)
    if path.is_file() or path.suffix == ".json":
        return _from_config(path, path.parent.name or path.stem)
    return known_shape(word)


def known_shape(name: str, loosely: bool = False) -> Shape:
    """The shape of a model that the catalog knows, whatever the case of its ID and with or without its owner.

    `loosely`: also of one whose name holds a known one, e.g. another precision of it. Raises RefusedError: FIT-MODEL.
    """
    rows = load_shapes()
    wanted = name.strip().lower()
    for row in rows:
        if wanted in (row.model.lower(), row.model.lower().rpartition("/")[2]):
            return replace(shape_of(row.config, row.model), source=row.source, verified=row.verified)
    base = base_name(name)
    likely = [row for row in rows if _begins(base_name(row.model), base)]
    if likely and loosely:
        row = max(likely, key=lambda row: len(base_name(row.model)))
        return replace(shape_of(row.config, row.model), source=row.source, verified=row.verified)
    near = names.nearest(name, [row.model for row in rows])
    why = f"the catalog knows the shapes of {len(rows)} models"
    raise RefusedError("FIT-MODEL", f"model {name or '(none)'}", why, f"did you mean {near}? Or give its config.json")


def _begins(known: str, name: str) -> bool:
    """The known name stands in the other one as a whole word."""
    return re.search(rf"(?<![a-z0-9.]){re.escape(known)}(?![a-z0-9.])", name) is not None


def _from_config(path: Path, name: str) -> Shape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise RefusedError("FIT-CONFIG", str(path), why, "name a config.json or a directory with one") from error
    except (ValueError, RecursionError) as error:
        raise RefusedError("FIT-CONFIG", str(path), "it is no JSON", "take the model's own config.json") from error
    if not isinstance(config, dict):
        raise RefusedError("FIT-CONFIG", str(path), "it is no object", "take the model's own config.json")
    told = cast("dict[str, Any]", config)
    beside = path.with_name("hf_quant_config.json")
    if "quantization_config" not in told and beside.is_file():
        told = {**told, "quantization_config": _modelopt(beside)}
    own = told.get("_name_or_path")
    return shape_of(told, own if isinstance(own, str) and own else name)


def _modelopt(path: Path) -> dict[str, Any]:
    """How ModelOpt quantised the files, where it wrote that beside the config.json, as vLLM reads it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        return {"quant_method": "modelopt", **told}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise RefusedError("FIT-CONFIG", str(path), "it tells no quantization", "take the model's own") from error


def _tensors(path: Path) -> tuple[int, int]:
    """By a safetensors file's header: values in 16 and 32 bits, and the bytes of all others."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LARGEST_HEADER:
                raise ValueError(length)
            header: object = json.loads(file.read(length))
        if not isinstance(header, Mapping):
            raise ValueError(header)
        values = others = 0
        for name, tensor in cast("Mapping[str, Any]", header).items():
            if name == "__metadata__":
                continue
            start, end = (int(offset) for offset in tensor["data_offsets"])
            size = _VALUE_BYTES.get(tensor["dtype"])
            values, others = (values + (end - start) // size, others) if size else (values, others + end - start)
        return values, others
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        why = "its header is no safetensors header"
        raise RefusedError("FIT-FILES", str(path), why, "download it again, or give its config.json") from error
