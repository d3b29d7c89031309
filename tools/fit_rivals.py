"""Formulas of other calculators, to be run beside ours on the same starts with the weights that the engine printed.

Each gets what ours gets: the GPU's memory as CUDA reports it, the utilisation, the printed weights, the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpuyard.plan.memory.cases import Error, summary
from gpuyard.plan.memory.fit import Fit
from gpuyard.plan.memory.shape import Shape

GIB = 2**30


def llm_d_planner(shape: Shape, done: Fit) -> float:
    """llm-d-incubation/llm-d-planner src/planner/capacity_planner.py @e50305a: constants by kind of architecture.

    One activation peak for each replica, whatever its GPUs; other memory on each GPU.
    """
    name = shape.name.lower()
    if "mistral-small" in name:
        peak = 2.5
    elif shape.experts:
        peak = 8.0
    elif "llama" in name:
        peak = 4.8
    elif "qwen" in name and not shape.multimodal:
        peak = 5.6
    else:
        peak = 2.5 if "llava" in name else 5.5
    return done.requested_gib - done.weights_gib - peak / done.gpus - (0.15 if done.gpus == 1 else 0.6)


def aiconfigurator(shape: Shape, done: Fit) -> float:
    """ai-dynamo/aiconfigurator sdk/backends @095f58a: buffers as wide as the model, NCCL, and 3.5 GiB.

    Factors of its TensorRT-LLM backend, which its vLLM backend takes over; 11 for dense models is from memory.
    """
    width = min(done.gpus, 8)
    factors = {1: 22.0, 2: 13.0, 4: 10.0, 8: 10.0} if shape.experts else {1: 11.0, 2: 6.5, 4: 5.0, 8: 5.0}
    peak = max(2 * done.max_num_batched_tokens * shape.hidden * factors[width], 70 * 2**20) / GIB
    nccl = {1: 0, 2: 358_612_992, 4: 411_041_792, 8: 411_041_792}[width] / GIB
    return done.requested_gib - done.weights_gib - peak - nccl - 3_758_096_384 / GIB


def a_fifth_more(_shape: Shape, done: Fit) -> float:
    """The rule of thumb of many pages, e.g. huggingface/accelerate's guide: inference takes the weights and 20 %."""
    return done.requested_gib - 1.2 * done.weights_gib


RIVALS: dict[str, Callable[[Shape, Fit], float]] = {
    "llm-d-planner": llm_d_planner,
    "aiconfigurator": aiconfigurator,
    "weights_and_20_percent": a_fifth_more,
}


def beside(errors: Sequence[Error], shape_of: Callable[[str], Shape]) -> dict[str, dict[str, float]]:
    """Summary of ours and of each rival on the same starts."""
    told = {"gpuyard": summary(errors)}
    for name, formula in RIVALS.items():
        shares = []
        for error in errors:
            done = error.prediction.done
            if done is None:
                continue
            printed = done.kv_cache_gib / (1 + error.share)
            shares.append(abs(formula(shape_of(done.model), done) / printed - 1))
        ordered = sorted(shares)
        told[name] = {"cases": len(ordered), "median": ordered[len(ordered) // 2], "worst": ordered[-1]}
    return told
