"""Answer tokens a second of one engine: measured by the operator, published, or reckoned and called unverified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from gpuyard.catalog.market import GpuSpeed
from gpuyard.catalog.market import Throughput as Benchmark
from gpuyard.plan.sizing.figures import GB, GIB, Figure, Ground, number
from gpuyard.plan.sizing.traffic import Path, tensor_seconds
from gpuyard.spec.closed import Closed

Basis = Literal["measured", "published", "reckoned"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's shape its speed and traffic follow from."""

    name: str
    """As owner/name, or its source."""
    layers: int
    hidden: int
    parameters: float
    active_parameters: float
    """Parameters that one token uses; all of them but for a mixture of experts."""
    weights_gib: float
    """Of one copy, on all its GPUs together."""
    kv_bytes_per_token: float
    """Of one copy, on all its GPUs together."""
    eight_bit: bool
    """Weights and activations are multiplied in 8 bit."""
    quantization: str | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What `gpuyard bench load` said of a model of this fleet: all of its copies together."""

    tokens_per_second: float
    where: str


class Throughput(Closed):
    basis: Basis
    tokens_per_second: Figure
    """Answer tokens of one copy of the model under load."""


def decode_step(ground: Ground, shape: Shape, speed: GpuSpeed, size: int, batch: int) -> float:
    """Seconds of one decode step of a batch without communication: what is read or what is computed, the longer."""
    context = ground.value("input_tokens") + ground.value("output_tokens") / 2
    weights = shape.weights_gib * GIB
    # A mixture of experts reads what its tokens ask for: with a large batch, nearly all.
    asked = min(1.0, shape.active_parameters / shape.parameters * batch)
    read = weights * asked + batch * context * shape.kv_bytes_per_token
    reading = read / (size * speed.memory_gb_s * GB * ground.value("memory_efficiency"))
    return max(reading, _computing(ground, shape, speed, size, batch))


def throughput(
    ground: Ground,
    shape: Shape,
    *,
    gpu: str,
    size: int,
    held: Callable[[Ground], int],
    path: Path,
    measured: Measured | None,
    copies: int,
) -> Throughput | None:
    """None where nobody measured and the catalog does not know the GPU's speed.

    `held`: requests that run at once, by the mean tokens of a request.
    """
    if measured:
        how = f"gpuyard bench load, {measured.where}: {number(measured.tokens_per_second)} tokens/s / {copies} copies"
        value = measured.tokens_per_second / copies
        figure = Figure(value=value, unit="tokens/s", how=how, verified=True)
        return Throughput(basis="measured", tokens_per_second=figure)
    speed = next((row for row in ground.market.gpu_speeds if row.gpu == gpu), None)
    rows = [
        row
        for row in ground.market.throughputs
        if (row.model, row.quantization, row.gpu, row.tensor_parallel_size)
        == (shape.name, shape.quantization, gpu, size)
    ]
    if rows:
        # A figure under a limit on latency is what users get; offline ones come after it.
        row = sorted(rows, key=lambda row: row.kind == "offline")[0]
        figure = _published(ground, shape, row, speed, held, path)
        return Throughput(basis="published", tokens_per_second=figure)
    batch = held(ground)
    if speed is None or batch < 1:
        return None
    return Throughput(basis="reckoned", tokens_per_second=reckoned(ground, shape, speed, size, batch, path))


def _published(
    ground: Ground, shape: Shape, row: Benchmark, speed: GpuSpeed | None, held: Callable[[Ground], int], path: Path
) -> Figure:
    """A published figure, from its own mix of prompts and answers to the fleet's."""
    value = row.output_tokens_per_second / row.copies
    how = (
        f"{number(row.output_tokens_per_second)} tokens/s / {row.copies} copies, {row.engine}, {row.kind}, "
        f"{row.as_of}: {row.source}"
    )
    if row.input_tokens is None or row.output_tokens is None or speed is None:
        how += "; its mix of prompts and answers is not told"
        return Figure(value=value, unit="tokens/s", how=how, verified=False)
    mix = {"input_tokens": row.input_tokens, "output_tokens": row.output_tokens}
    asked, given = ground.value("input_tokens"), ground.value("output_tokens")
    if (asked, given) == (row.input_tokens, row.output_tokens):
        return Figure(value=value, unit="tokens/s", how=how, verified=row.verified)
    theirs = replace(ground, stated={**ground.stated, **mix})
    size = row.tensor_parallel_size
    there, here = (reckoned(each, shape, speed, size, max(held(each), 1), path).value for each in (theirs, ground))
    how += (
        f"; x {here / there:.3g}: {number(here)} tokens/s reckoned at {number(asked)} + {number(given)} tokens / "
        f"{number(there)} at its {number(row.input_tokens)} + {number(row.output_tokens)}"
    )
    return Figure(value=value * here / there, unit="tokens/s", how=how, verified=False)


def reckoned(ground: Ground, shape: Shape, speed: GpuSpeed, size: int, batch: int, path: Path) -> Figure:
    """From memory bandwidth, FLOPS and all-reduces: what no engine exceeds by much and few reach."""
    given, asked = ground.value("output_tokens"), ground.value("input_tokens")
    step = decode_step(ground, shape, speed, size, batch)
    prefill = _computing(ground, shape, speed, size, asked)
    decode_sent = tensor_seconds(path, shape.layers, shape.hidden, size, batch)
    prefill_sent = tensor_seconds(path, shape.layers, shape.hidden, size, asked)
    rates = [
        batch * given / (given * (step + decode_sent[end]) + batch * (prefill + prefill_sent[end])) for end in (0, 1)
    ]
    how = (
        f"{batch} requests x {number(given)} tokens / ({number(given)} steps x ({step * 1e3:.4g} ms + all-reduce "
        f"{decode_sent[0] * 1e3:.3g} to {decode_sent[1] * 1e3:.3g} ms) + {batch} x prefill "
        f"{(prefill + prefill_sent[1]) * 1e3:.4g} ms at most); of that {LEAST_REACHED} to {MOST_REACHED} was reached "
        "in published benchmarks"
    )
    low, high = rates[1] * LEAST_REACHED, rates[0] * MOST_REACHED
    return Figure(value=(low * high) ** 0.5, low=low, high=high, unit="tokens/s", how=how, verified=False)


LEAST_REACHED, MOST_REACHED = 0.3, 0.9
"""Published figures as shares of what is reckoned for them; `tests/plan/test_sizing_parts.py` has each."""


def _computing(ground: Ground, shape: Shape, speed: GpuSpeed, size: int, tokens: float) -> float:
    tflops = speed.tflops_8bit if shape.eight_bit and speed.tflops_8bit else speed.tflops_16bit
    return 2 * shape.active_parameters * tokens / (size * tflops * 1e12 * ground.value("compute_efficiency"))
