"""What a model's memory means to a plan: does it fit, what fills each GPU, how many requests at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gpuyard.plan.sizing.throughput import Shape
from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Engine, Model


class Part(Closed):
    """One part of a GPU's memory, in GiB; low and high are its interval."""

    name: str
    gib: float
    low: float
    high: float


class Memory(Closed):
    """One GPU's memory under one model."""

    gpu: str
    tensor_parallel_size: int
    fits: bool
    total_gib: float
    requested_gib: float
    """What the engine may take of it."""
    parts: tuple[Part, ...]
    kv_cache_tokens: int
    """Of one copy, on all its GPUs together."""
    max_concurrency: float
    """Requests of the longest context that the cache holds at once."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory, and why it is not enough where it is not."""

    memory: Memory | None
    """None: the request was refused before anything was reckoned, e.g. heads that do not divide."""
    rule: str
    why: str
    change: str

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.fits


class Rooms(Protocol):
    """Who knows of models and of memory."""

    def shape(self, model: Model) -> Shape | None:
        """None where nobody knows the model."""
        ...

    def room(self, model: Model, engine: Engine, gpu: str, size: int) -> Room | None:
        """Room of one copy on so many GPUs. None where the model or the GPU is not known."""
        ...


class NoRooms:
    """Nobody knows: every model that needs a GPU is told as FIT-UNKNOWN."""

    def shape(self, model: Model) -> Shape | None:  # noqa: ARG002
        return None

    def room(self, model: Model, engine: Engine, gpu: str, size: int) -> Room | None:  # noqa: ARG002
        return None
