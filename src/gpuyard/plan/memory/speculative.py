"""Speculative decoding: what a draft takes of the memory, beside the model whose tokens it guesses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from gpuyard.catalog.memory import Quantization
from gpuyard.plan import names
from gpuyard.plan.memory.reader import whole
from gpuyard.plan.memory.shape import STATES, Layer, Shape
from gpuyard.plan.memory.weights import DTYPE_BYTES, layer_bytes, vocab_rows, weights_of
from gpuyard.spec.errors import RefusedError

Method = Literal["ngram", "suffix", "mtp", "eagle", "eagle3", "draft_model"]
_METHODS: tuple[Method, ...] = ("ngram", "suffix", "mtp", "eagle", "eagle3", "draft_model")
_MOST = 64  # tokens; no method guesses as many with a gain
_AUXILIARY = 3  # hidden states of the model that EAGLE-3 reads


@dataclass(frozen=True, slots=True)
class Draft:
    method: Method
    tokens: int
    shape: Shape | None
    """Of a draft with files of its own: eagle, eagle3, draft_model."""
    tensor: int
    """Ranks that share it."""
    quantization: Quantization | None = None
    """Of its own files."""


def draft_of(
    told: object,
    target: Shape,
    tensor: int,
    shape_named: Callable[[str], Shape],
    quantized: Callable[[Shape], Quantization | None],
) -> Draft:
    """From vLLM's --speculative-config. Raises RefusedError: FIT-SPECULATIVE, and what `shape_named` refuses."""
    if not isinstance(told, Mapping):
        raise _refused("it", "it is no JSON object", 'e.g. {"method": "ngram", "num_speculative_tokens": 4}')
    config = cast("Mapping[str, Any]", told)
    model = config.get("model")
    method = _method(str(config.get("method") or _guessed(str(model or ""))))
    tokens = config.get("num_speculative_tokens", 1 if method == "mtp" else None)
    if not whole(tokens) or not 1 <= int(cast("int", tokens)) <= _MOST:
        raise _refused("num_speculative_tokens", f"{tokens!r} is no count of 1 to {_MOST}", "take e.g. 3")
    ranks = config.get("draft_tensor_parallel_size") or tensor
    if ranks not in (1, tensor):
        raise _refused("draft_tensor_parallel_size", f"{ranks!r} is neither 1 nor {tensor}", f"take {tensor}")
    if method in ("ngram", "suffix", "mtp"):
        if method == "mtp" and _predicting(target) is None:
            raise _refused("method", f"{target.name} has no layer of attention to guess with", "take ngram")
        return Draft(method, int(cast("int", tokens)), None, tensor)
    if not isinstance(model, str) or not model:
        raise _refused("model", f"{method} needs a draft", "name its config.json, its directory or its ID")
    shape = shape_named(model)
    if method == "draft_model" and shape.vocab != target.vocab:
        why = f"the draft has a vocabulary of {shape.vocab}, {target.name} of {target.vocab}"
        raise _refused("model", why, "take a draft of the same family")
    return Draft(method, int(cast("int", tokens)), shape, ranks, quantized(shape))


def draft_bytes(draft: Draft, target: Shape, quantization: Quantization | None, dtype: str, stages: int) -> int:
    """Of its weights on each rank of the last pipeline stage. `quantization` and `dtype` are the target's."""
    bare, hidden = DTYPE_BYTES.get(dtype, 2), target.hidden
    if draft.method == "mtp":
        layer = _predicting(target)
        # It joins the last hidden state with the next token's embedding; embeddings and head are the target's own.
        own = layer_bytes(target, layer, draft.tensor, quantization, dtype) if layer else 0.0
        return int(own + 2 * hidden * hidden * bare)
    if draft.shape is None:
        return 0
    shape = draft.shape
    if draft.method == "draft_model":
        return weights_of(shape, draft.tensor, 1, draft.quantization, dtype).per_rank[0]
    total = sum(layer_bytes(shape, layer, draft.tensor, draft.quantization, dtype) for layer in shape.layers)
    if draft.method == "eagle3":
        first = shape.layers[0]
        read = shape.heads * first.head_dim + first.kv_heads * (first.head_dim + first.value_dim)
        # Its first layer reads two widths, and its head knows the words that are frequent.
        words = vocab_rows(shape.draft_vocab or shape.vocab, draft.tensor)
        total += (_AUXILIARY * hidden * shape.hidden + shape.hidden * (read / draft.tensor + words)) * bare
    else:
        total += 2 * shape.hidden * shape.hidden * bare
    if shape.hidden != hidden or stages > 1:
        # Only an embedding of the same width, on the same rank, is shared with the target's.
        total += vocab_rows(shape.vocab, draft.tensor) * shape.hidden * bare
    return int(total)


def draft_layers(draft: Draft, target: Shape) -> tuple[Shape, tuple[Layer, ...]]:
    """The layers with a cache that it adds, and the shape that they are of."""
    if draft.shape is not None:
        return draft.shape, draft.shape.layers
    layer = _predicting(target) if draft.method == "mtp" else None
    return target, (layer,) if layer else ()


def _predicting(target: Shape) -> Layer | None:
    """A layer that guesses the next token is as the last that attends."""
    attending = [layer for layer in target.layers if layer.mixer not in (*STATES, "none", "cross")]
    return attending[-1] if attending else None


def _guessed(model: str) -> str:
    """As vLLM takes it, where the method is not told."""
    low = model.lower()
    return "eagle3" if "eagle3" in low else "eagle" if "eagle-" in low else "draft_model" if model else ""


def _method(word: str) -> Method:
    if word.endswith("_mtp"):
        return "mtp"
    for method in _METHODS:
        if word == method:
            return method
    near = names.nearest(word or "ngram", _METHODS)
    why = f"{word or '(none)'} is none of {', '.join(_METHODS)}, whose weights are known"
    raise _refused("method", why, f"did you mean {near}? Or give --weights-gib of a start, which holds the draft's too")


def _refused(field: str, why: str, change: str) -> RefusedError:
    return RefusedError("FIT-SPECULATIVE", f"--speculative-config: {field}", why, change)
