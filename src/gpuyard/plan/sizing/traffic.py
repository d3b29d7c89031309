"""What the GPUs of one model say to each other for each token, and what that costs in tokens a second.

Tensor parallelism sums the partial results of all its GPUs twice in each layer (after attention and after the MLP). A
ring moves 2 x (N - 1) / N of the summed bytes through each GPU, which is how nccl-tests reckons its bus bandwidth.
Pipeline parallelism hands the hidden state on once at each boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuyard.catalog.rows import Instance
from gpuyard.plan.sizing.figures import GB, Figure, Ground, number, proven
from gpuyard.spec.closed import Closed

Medium = Literal["nvlink", "pcie", "efa", "network", "infiniband"]

_ACTIVATION_BYTES = 2
_PER_LAYER = 2


@dataclass(frozen=True, slots=True)
class Path:
    """The way between GPUs: bus bandwidth in GB/s and seconds of one small exchange, each as an interval."""

    medium: Medium
    name: str
    low_gb_s: float
    high_gb_s: float
    low_s: float
    high_s: float
    verified: bool
    how: str


class Traffic(Closed):
    """What one way between the GPUs of a model costs."""

    parallel: Literal["tensor", "pipeline"]
    """tensor: all its GPUs sum in each layer; pipeline: two stages, one in each of two nodes."""
    over: str
    bytes_per_token: Figure
    """Through each GPU, for each token of a batch."""
    tokens_per_second_lost: Figure
    """Of what the same GPUs would answer if their links cost nothing."""
    share_lost: Figure


def allreduce_bytes(layers: int, hidden: int, size: int) -> float:
    """Bytes through each GPU for each token under tensor parallelism of this size, activations in 16 bit."""
    return _PER_LAYER * layers * hidden * _ACTIVATION_BYTES * 2 * (size - 1) / size


def inside(ground: Ground, gpu: str, gpus: int) -> Path:
    """The way between GPUs of one node: NVLink where the board has it for as many, else PCIe."""
    speed = next((row for row in ground.market.gpu_speeds if row.gpu == gpu), None)
    joined = speed is not None and speed.nvlink_gb_s > 0 and (not speed.bridged or gpus <= 2)
    tested = next((row for row in ground.market.links if row.gpu == gpu), None)
    model = next((row for row in ground.market.link_models if row.gpu == gpu), None)
    if joined and speed:
        nominal = speed.nvlink_gb_s / 2
        high = max(nominal, tested.allreduce_busbw_gb_s if tested else 0)
        low = tested.allreduce_busbw_gb_s if tested and tested.gpus >= gpus else nominal / 2
        told = f"least accepted {number(low)} GB/s" if tested else f"half of one way, {number(low)} GB/s"
        how = f"NVLink {number(speed.nvlink_gb_s)} GB/s both ways; {told}"
        latency = _latency(ground, "nvlink_latency_us")
        return Path("nvlink", f"NVLink of {gpu}", low, high, *latency, proven(tested), how)
    row = ground.rows["pcie_busbw_gb_s"]
    high = tested.allreduce_busbw_gb_s if tested else min(model.intra_node_gb_s if model else row.high, row.high)
    how = f"PCIe without NVLink: {number(row.low)} GB/s assumed at least, {number(high)} at most"
    return Path("pcie", f"PCIe of {gpu}", row.low, high, *_latency(ground, "pcie_latency_us"), False, how)


def between(ground: Ground, instance: Instance, size: int) -> Path | None:
    """The way of so many GPUs in two nodes of a cloud's machine; None where its network is not told."""
    if not instance.network_gbps:
        return None
    medium: Medium = "efa" if instance.efa else "network"
    each = -(-size // 2)
    high = instance.network_gbps / 8
    low = high * 0.8 * min(1.0, each / instance.gpus)
    name = f"{'EFA' if instance.efa else 'network'} of {instance.instance}"
    how = (
        f"{number(instance.network_gbps)} Gbit/s / 8 = {number(high)} GB/s of a node at most; "
        f"0.8 (assumed) of the share of {each} of its {instance.gpus} GPUs at least"
    )
    return Path(medium, name, low, high, *_latency(ground, "network_latency_us"), False, how)


def fabrics(ground: Ground, size: int) -> list[Path]:
    """The InfiniBand generations between so many GPUs in two nodes, with one port for each GPU."""
    each = -(-size // 2)
    return [
        Path(
            "infiniband",
            row.fabric,
            row.gbps_per_gpu / 8 * each * 0.8,
            row.gbps_per_gpu / 8 * each,
            *_latency(ground, "network_latency_us"),
            False,
            f"{number(row.gbps_per_gpu)} Gbit/s / 8 x {each} ports of a node; 0.8 of that at least (assumed)",
        )
        for row in ground.market.fabrics
    ]


def tensor_seconds(path: Path, layers: int, hidden: int, size: int, tokens: float) -> tuple[float, float]:
    """Least and most seconds that one pass of so many tokens spends in all-reduces."""
    if size == 1:
        return 0.0, 0.0
    moved = allreduce_bytes(layers, hidden, size) * tokens
    calls = _PER_LAYER * layers
    return (
        moved / (path.high_gb_s * GB) + calls * path.low_s,
        moved / (path.low_gb_s * GB) + calls * path.high_s,
    )


def tensor_parallel(path: Path, layers: int, hidden: int, size: int, batch: int, step: float) -> Traffic:
    """What tensor parallelism costs over a path. `step`: seconds of one decode step of the batch without it."""
    moved = allreduce_bytes(layers, hidden, size)
    how = f"2 x {layers} layers x {hidden} x 2 B x 2 x ({size} - 1) / {size}"
    times = tensor_seconds(path, layers, hidden, size, batch)
    calls = f"{_PER_LAYER * layers} all-reduces x {_us(path.low_s)} to {_us(path.high_s)} us"
    spent = f"{number(moved)} B x {batch} / {number(path.low_gb_s)} to {number(path.high_gb_s)} GB/s + {calls}"
    return _lost("tensor", path, moved, how, times, batch, step, spent)


def pipeline_parallel(path: Path, hidden: int, stages: int, batch: int, step: float) -> Traffic:
    """What handing on between pipeline stages costs over a path. The stages' waiting for each other is not in it."""
    moved = hidden * _ACTIVATION_BYTES * (stages - 1) / stages
    how = f"{hidden} x 2 B x ({stages} - 1) boundaries / {stages} stages"
    sent = hidden * _ACTIVATION_BYTES * batch
    times = (
        (stages - 1) * (sent / (path.high_gb_s * GB) + path.low_s),
        (stages - 1) * (sent / (path.low_gb_s * GB) + path.high_s),
    )
    spent = f"({stages} - 1) x ({number(sent)} B / bandwidth + {_us(path.low_s)} to {_us(path.high_s)} us)"
    return _lost("pipeline", path, moved, how, times, batch, step, spent)


def _lost(
    parallel: Literal["tensor", "pipeline"],
    path: Path,
    moved: float,
    how: str,
    times: tuple[float, float],
    batch: int,
    step: float,
    spent: str,
) -> Traffic:
    free = batch / step
    lost = [free - batch / (step + seconds) for seconds in (*times, sum(times) / 2)]
    arithmetic = f"{batch} / {step * 1e3:.4g} ms - {batch} / ({step * 1e3:.4g} ms + t), t = {spent}"
    return Traffic(
        parallel=parallel,
        over=path.name,
        bytes_per_token=Figure(value=moved, unit="B", how=how, verified=True),
        tokens_per_second_lost=Figure(
            value=lost[2], low=lost[0], high=lost[1], unit="tokens/s", how=arithmetic, verified=False
        ),
        share_lost=Figure(
            value=lost[2] / free,
            low=lost[0] / free,
            high=lost[1] / free,
            unit="of tokens/s",
            how=f"{number(lost[2])} / {number(free)} tokens/s; {path.how}",
            verified=False,
        ),
    )


def _latency(ground: Ground, name: str) -> tuple[float, float]:
    row = ground.rows[name]
    return row.low * 1e-6, row.high * 1e-6


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}"
