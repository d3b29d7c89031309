"""Who is generated when, and how fast: a queue, places, a KV cache in blocks, and the time that tokens take."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .control import Control
from .metrics import Metrics
from .settings import Settings
from .tokens import EOS, answer, dice, other_than

LAB_GPUS = Path("/var/lib/gpuyard-lab/gpus.json")
GIB = 1 << 30
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


class StartError(Exception):
    """The engine cannot start, as the real one could not."""


class EngineDeadError(Exception):
    """The engine ended in the middle of its work; what still asks is told so."""

    def __init__(self) -> None:
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.")


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """How much context fits beside the weights."""

    max_model_len: int
    blocks: int
    block_size: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size


def memory_of(settings: Settings, environment: dict[str, str]) -> Memory:
    """What the model's own configuration and the node's memory make possible. Raises StartError."""
    folder = Path(settings.model)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartError(f"OSError: {folder} has no config.json that can be read: {error}") from error
    longest = int(config.get("max_position_embeddings", 2048))
    length = settings.max_model_len or longest
    if length > longest:
        raise StartError(
            f"ValueError: User-specified max_model_len ({length}) is greater than the derived max_model_len "
            f"(max_position_embeddings={longest} in the model's config.json)."
        )
    dtype = settings.kv_cache_dtype if settings.kv_cache_dtype != "auto" else settings.dtype
    heads = int(config.get("num_attention_heads", 1))
    head = int(config.get("head_dim") or config.get("hidden_size", 64) // heads)
    kept = int(config.get("num_key_value_heads", heads))
    a_token = 2 * int(config.get("num_hidden_layers", 1)) * kept * head * BYTES_OF.get(dtype, 2)
    if settings.kv_cache_size:
        room = float(settings.kv_cache_size * settings.block_size * a_token)
    else:
        room = cache_bytes(settings, environment, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    need = length * a_token
    if room < need:
        raise StartError(
            f"ValueError: To serve at least one request with the models's max seq len ({length}), "
            f"({need / GIB:.2f} GiB KV cache is needed, which is larger than the available KV cache memory "
            f"({max(room, 0) / GIB:.2f} GiB). Try increasing `gpu_memory_utilization` or decreasing `max_model_len` "
            "when initializing the engine."
        )
    return Memory(length, int(room // (a_token * settings.block_size)), settings.block_size)


def cache_bytes(settings: Settings, environment: dict[str, str], weights: int) -> float:
    """On GPUs what is left of them, elsewhere what the environment sets aside."""
    gpus = gpus_of_the_node()
    if not gpus:
        return float(environment.get("VLLM_CPU_KVCACHE_SPACE", "4")) * GIB
    used = gpus[: settings.tensor_parallel_size]
    if len(used) < settings.tensor_parallel_size:
        raise StartError(f"ValueError: tensor_parallel_size is {settings.tensor_parallel_size}, GPUs are {len(gpus)}.")
    return sum(int(gpu["memory_mib"]) << 20 for gpu in used) * settings.gpu_memory_utilization - weights


def gpus_of_the_node() -> list[dict[str, Any]]:
    try:
        return json.loads(LAB_GPUS.read_text(encoding="utf-8"))["gpus"]
    except (OSError, ValueError, KeyError):
        return []


# --- sequences -------------------------------------------------------------------------------------------------------


class Sequence:
    """One answer on its way."""

    def __init__(self, prompt: int, most: int) -> None:
        self.prompt = prompt
        self.most = most
        self.done = 0
        self.blocks = 0
        self.preempted = 0
        self.put_back = False
        self.arrived = time.monotonic()
        self.began = 0.0
        self.first = 0.0
        self.last = 0.0


@dataclass(frozen=True)
class Wanted:
    """What decides about the tokens of one answer."""

    prompt: list[int]
    echo: list[int]
    seed: object
    sample: int
    most: int
    least: int
    ignore_eos: bool
    n: int
    words: str


class Core:
    """All that runs and waits. A sequence that finds no block sends the youngest back to the queue, as vLLM does."""

    def __init__(self, settings: Settings, memory: Memory, metrics: Metrics, control: Control) -> None:
        self.settings = settings
        self.memory = memory
        self.metrics = metrics
        self.control = control
        self.free = memory.blocks
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.places: dict[Sequence, asyncio.Future[None]] = {}
        self.frozen = False
        """The part that generates is gone; what it was at stays as it is."""
        self.dead = False
        self.ended = asyncio.Event()
        """Set when the engine is dead: who waits for a token is told at once."""
        self.random = random.Random(settings.seed)  # noqa: S311 - jitter, no secret

    @property
    def busy(self) -> int:
        return len(self.running) + len(self.waiting)

    # A sequence needs a place and the blocks of its prompt; the queue is first come, first served.
    async def admit(self, sequence: Sequence, front: bool = False) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.places[sequence] = place
        (self.waiting.appendleft if front else self.waiting.append)(sequence)
        self.fill()
        await place

    def fill(self) -> None:
        while self.waiting and len(self.running) < self.settings.max_num_seqs:
            sequence = self.waiting[0]
            need = self.blocks_for(sequence)
            if need > self.free:
                break
            self.waiting.popleft()
            sequence.blocks = need
            self.free -= need
            self.running.append(sequence)
            sequence.began = sequence.began or time.monotonic()
            place = self.places.pop(sequence)
            if not place.done():
                place.set_result(None)
        self.show()

    def blocks_for(self, sequence: Sequence) -> int:
        return -(-(sequence.prompt + sequence.done + 1) // self.memory.block_size)

    async def grow(self, sequence: Sequence) -> None:
        """Room for one more token."""
        while not self.ended.is_set() and (sequence.put_back or self.blocks_for(sequence) > sequence.blocks):
            if sequence.put_back:
                sequence.put_back = False
                await self.admit(sequence, front=True)
                await self.pause(self.first_token_seconds(sequence))
            elif self.free:
                self.free -= 1
                sequence.blocks += 1
            else:
                youngest = self.running[-1]
                self.release(youngest)
                youngest.put_back = True
                youngest.preempted += 1
                self.metrics.add("num_preemptions")

    def release(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            self.free += sequence.blocks
            sequence.blocks = 0
        elif sequence in self.places:
            self.waiting.remove(sequence)
            del self.places[sequence]

    def show(self) -> None:
        self.metrics.set("num_requests_running", len(self.running))
        self.metrics.set("num_requests_waiting", len(self.waiting))
        self.metrics.set("num_requests_waiting_by_reason", len(self.waiting), "capacity")
        self.metrics.set("kv_cache_usage_perc", 1 - self.free / self.memory.blocks)

    # --- time

    def first_token_seconds(self, sequence: Sequence) -> float:
        told = self.settings
        if told.time_to_first_token:
            return self.about(told.time_to_first_token, told.time_to_first_token_std_dev)
        prefill = told.prefill_overhead + told.prefill_time_per_token * (sequence.prompt + sequence.done)
        return self.about(prefill, told.prefill_time_std_dev)

    def next_token_seconds(self) -> float:
        return self.about(self.settings.inter_token_latency, self.settings.inter_token_latency_std_dev)

    def about(self, milliseconds: float, deviation: float) -> float:
        """Never further than 70 % away, however the dice fall, and longer the more sequences there are."""
        if deviation:
            drawn = self.random.gauss(milliseconds, deviation)
            milliseconds = min(max(drawn, 0.3 * milliseconds), 1.7 * milliseconds)
        others = max(self.settings.max_num_seqs - 1, 1)
        load = 1 + (self.settings.time_factor_under_load - 1) * (len(self.running) - 1) / others
        return milliseconds / 1000 * max(load, 1)

    async def pause(self, seconds: float) -> None:
        """Let time pass as the faults of the moment have it; ends early when all shall end."""
        until = time.monotonic() + seconds * self.control.now().latency_factor
        while not self.ended.is_set():
            left = until - time.monotonic()
            if self.frozen or self.control.now().hang:
                await asyncio.sleep(0.05)
            elif left > 0:
                await asyncio.sleep(left)
            else:
                await asyncio.sleep(0)
                return

    # --- tokens

    async def tokens(self, wanted: Wanted) -> AsyncGenerator[int, None]:
        """The tokens of one answer, each when its time has come; EOS where it ends by itself."""
        if self.dead:
            raise EngineDeadError
        crash = self.control.now().crash_on_prompt
        if crash and crash in wanted.words:
            self.die()
        sequence = Sequence(len(wanted.prompt), wanted.most)
        try:
            await self.admit(sequence)
            stream = self.chosen(wanted)
            for place, token in enumerate(stream):
                await self.grow(sequence)
                await self.pause(self.first_token_seconds(sequence) if place == 0 else self.next_token_seconds())
                if self.dead:
                    raise EngineDeadError
                self.count(sequence)
                yield token
                if token == EOS or sequence.done >= wanted.most:
                    return
        finally:
            self.release(sequence)
            self.fill()
            self.sum_up(sequence, wanted)

    def chosen(self, wanted: Wanted) -> Iterator[int]:
        """What the model would say, or the wrong token that a fault puts in its place."""
        question = dice(*wanted.prompt)
        model = self.settings.name
        stream = iter([*wanted.echo, EOS]) if wanted.echo else answer(question, wanted.seed, model, wanted.sample)
        place = 0
        for token in stream:
            if token == EOS and (wanted.ignore_eos or place < wanted.least):
                continue
            faults = self.control.now()
            key = (faults.seed, question, wanted.sample, place)
            if token != EOS and dice("rate", *key) % 10**6 < faults.wrong_token_rate * 10**6:
                token = other_than(token, *key)
            yield token
            place += 1

    def count(self, sequence: Sequence) -> None:
        now = time.monotonic()
        sequence.done += 1
        if sequence.done == 1:
            sequence.first = now
            self.metrics.observe("time_to_first_token_seconds", now - sequence.arrived)
            self.metrics.add("prompt_tokens", sequence.prompt)
            self.metrics.add("prompt_tokens_by_source", sequence.prompt, "local_compute")
            self.metrics.add("prefix_cache_queries", sequence.prompt)
        else:
            self.metrics.observe("inter_token_latency_seconds", now - sequence.last)
        sequence.last = now
        self.metrics.add("generation_tokens")
        self.metrics.observe("iteration_tokens_total", 1 if sequence.done > 1 else sequence.prompt + 1)

    def sum_up(self, sequence: Sequence, wanted: Wanted) -> None:
        if not sequence.done:
            return
        observe = self.metrics.observe
        decode = sequence.last - sequence.first
        observe("request_prompt_tokens", sequence.prompt)
        observe("request_generation_tokens", sequence.done)
        observe("request_max_num_generation_tokens", sequence.done)
        observe("request_params_n", wanted.n)
        observe("request_params_max_tokens", wanted.most)
        observe("e2e_request_latency_seconds", sequence.last - sequence.arrived)
        observe("request_queue_time_seconds", sequence.began - sequence.arrived)
        observe("request_inference_time_seconds", sequence.last - sequence.began)
        observe("request_prefill_time_seconds", sequence.first - sequence.began)
        observe("request_decode_time_seconds", decode)
        observe("request_time_per_output_token_seconds", decode / max(sequence.done - 1, 1))
        observe("request_num_preemptions", sequence.preempted)
        observe("request_prefill_kv_computed_tokens", sequence.prompt)

    # --- the end

    def die(self) -> None:
        """What a crash of the worker is to everybody else: every request fails, then the server ends."""
        self.dead = True
        self.ended.set()
        for place in self.places.values():
            if not place.done():
                place.set_result(None)
        self.places.clear()
        self.waiting.clear()
        raise EngineDeadError
