"""From the layers' cache specs and a budget in bytes to blocks, tokens and requests: vLLM's planning, by version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["full", "mla", "sliding", "chunked", "cross", "mamba"]
Planner = Literal[
    "one-group", "groups", "groups-1.25", "groups-first", "stages-first", "groups-1.5", "padded", "padded-null"
]
"""one-group: every layer keeps every token. groups: layers of different kinds share a pool of equal pages.
groups-1.25, groups-1.5: the same with larger groups where kinds are nearly even, and pages made equal by larger blocks.
groups-first, stages-first: as groups-1.25, but a start asks for the first group's blocks only; for all layers on each
stage, or for the stage's own.
padded: pages that do not divide are padded too. padded-null: and one block is kept back."""


class CannotPlanError(ValueError):
    """The engine refuses this set of layers."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What one layer keeps. Bytes are per GPU, after tensor parallelism."""

    kind: Kind
    block_size: int
    """Tokens per block."""
    unit_bytes: int
    """Bytes per token; of mamba: per state."""
    window: int | None = None
    """Tokens of a sliding window, of a chunk, or of what an encoder makes."""
    padded: int | None = None
    """Bytes that a page is padded to."""
    states: int = 1
    """Blocks per request; mamba only: one, and one for each speculative token."""
    layout: tuple[int | str, ...] = ()
    """What makes it another kind of layer although its bytes are the same, e.g. heads and head size."""

    @property
    def page_bytes(self) -> int:
        bare = self.unit_bytes if self.kind == "mamba" else self.unit_bytes * self.block_size
        return bare if self.padded is None else self.padded

    def blocks_per_request(self, max_model_len: int, in_flight_tokens: int) -> int:
        match self.kind:
            case "full" | "mla":
                return _up(max_model_len, self.block_size)
            case "sliding":
                return _up(min((self.window or 0) - 1 + in_flight_tokens, max_model_len), self.block_size) + 1
            case "chunked":
                return _up(min((self.window or 0) + in_flight_tokens, max_model_len), self.block_size)
            case "cross":
                return _up(self.window or 0, self.block_size)
            case "mamba":
                return self.states


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share one table of blocks."""

    layers: tuple[str, ...]
    specs: tuple[Spec, ...]
    """One for each layer."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the engine makes of the memory."""

    num_blocks: int
    tokens: int
    """As the engine prints it: for a model of several groups a matter of its version."""
    max_concurrency: float
    """Requests of max_model_len that fit at once."""
    groups: int
    bytes_per_block: int
    """On the rank that decides."""
    needed_bytes: int
    """Least memory that one request of max_model_len needs, on the rank that needs most."""
    starts: bool
    """The engine starts: one request of max_model_len fits on every rank."""


_BY_LAYER = ("one-group", "groups", "groups-1.25")
"""A start asks for what every layer needs by itself."""
_WHOLE = ("groups", "groups-1.25", "groups-first")
"""A group of several specs is not cut into stages."""

Rank = Sequence[tuple[str, Spec]]
"""The layers of one rank by name; ranks of one pipeline stage have the same."""


def plan(
    planner: Planner,
    ranks: Sequence[Rank],
    available: Sequence[int],
    max_model_len: int,
    in_flight_tokens: int,
    tokens_by_concurrency: bool,
) -> Blocks:
    """Blocks of the ranks with so many bytes `available`: the rank with fewest decides for all.

    Raises CannotPlanError where the engine refuses the layers. Without layers that keep anything there is one block.
    """
    merged = dict(layer for rank in ranks for layer in rank)
    if not merged:
        return Blocks(1, 0, 0.0, 0, 0, 0, True)
    try:
        groups = groups_of(planner, merged)
    except CannotPlanError:
        # These versions ask for the memory first, so that a model too large for it is told that.
        least = [_all_kept(rank, max_model_len, in_flight_tokens) for rank in ranks]
        short = any(need > memory for need, memory in zip(least, available, strict=True))
        if planner in _BY_LAYER and short:
            return Blocks(0, 0, 0.0, 0, 0, max(least), False)
        raise
    own = [[_on_rank(group, {name for name, _ in rank}) for group in groups] for rank in ranks]
    sizes = [max(sum(spec.page_bytes for spec in group.specs) for group in parts) for parts in own]
    if planner in _WHOLE and len(groups) == 1 and len(set(groups[0].specs)) > 1:
        # A group of several specs is not cut into stages: each stage pays for all layers.
        sizes = [sum(spec.page_bytes for spec in groups[0].specs)] * len(ranks)
    blocks = [max(memory, 0) // size if size else None for memory, size in zip(available, sizes, strict=True)]
    num_blocks = min(count for count in blocks if count is not None)
    each = [max(spec.blocks_per_request(max_model_len, in_flight_tokens) for spec in group.specs) for group in groups]
    first, per_request = each[0], sum(each)
    if planner in _BY_LAYER:
        needed = [_all_kept(rank, max_model_len, in_flight_tokens) for rank in ranks]
    elif planner == "groups-first":
        needed = [first * max(sum(spec.page_bytes for spec in group.specs) for group in groups)] * len(ranks)
        available = [min(available)] * len(ranks)
    elif planner == "stages-first":
        needed = [first * size for size in sizes]
    else:
        needed = [(per_request + (planner == "padded-null")) * size for size in sizes]
    concurrency = num_blocks / per_request
    smallest = min(group.specs[0].block_size for group in groups)
    tokens = int(concurrency * max_model_len) if tokens_by_concurrency else num_blocks // len(groups) * smallest
    deciding = min(range(len(ranks)), key=lambda rank: (blocks[rank] is None, blocks[rank]))
    return Blocks(
        num_blocks=num_blocks,
        tokens=tokens,
        max_concurrency=concurrency,
        groups=len(groups),
        bytes_per_block=sizes[deciding],
        needed_bytes=max(needed),
        starts=all(need <= memory and memory > 0 for need, memory in zip(needed, available, strict=True)),
    )


def groups_of(planner: Planner, layers: dict[str, Spec]) -> list[Group]:
    """The layers by the table of blocks that they share."""
    specs = list(layers.values())
    if planner == "one-group":
        layers = {name: _kept_whole(spec) for name, spec in layers.items()}
        specs = list(layers.values())
    if len(set(specs)) == 1 or _one_type(planner, specs):
        return [Group(tuple(layers), tuple(specs))]
    if planner == "one-group":
        raise CannotPlanError("this version knows one kind of layer per model")
    layers = _equal_pages(planner, layers)
    kinds: dict[Spec, list[str]] = {}
    for name, spec in layers.items():
        kinds.setdefault(spec, []).append(name)
    fewest, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    slack = {"groups": 0.0, "groups-1.25": 1.25, "groups-first": 1.25, "stages-first": 1.25}.get(planner, 1.5)
    size = most if most < fewest * slack else fewest
    groups: list[Group] = []
    for spec, names in kinds.items():
        count = _up(len(names), size)
        # Every count-th layer, not the first so many: a pipeline stage then has layers of each group.
        for first in range(count):
            part = tuple(names[first::count])
            groups.append(Group(part, (spec,) * len(part)))
    return groups


def _one_type(planner: Planner, specs: list[Spec]) -> bool:
    """All layers need the same slots, so that they share one table although their pages differ."""
    first = specs[0]
    if any(spec.block_size != first.block_size for spec in specs):
        return False
    if first.kind in ("full", "mla"):
        return all(spec.kind in ("full", "mla") for spec in specs)
    same = all((spec.kind, spec.window, spec.states) == (first.kind, first.window, first.states) for spec in specs)
    if first.kind == "mamba" and planner in ("padded", "padded-null"):
        return same and all(spec.page_bytes == first.page_bytes for spec in specs)
    return same


def _equal_pages(planner: Planner, layers: dict[str, Spec]) -> dict[str, Spec]:
    page = max(spec.page_bytes for spec in layers.values())
    equal: dict[str, Spec] = {}
    for name, spec in layers.items():
        if spec.page_bytes == page:
            equal[name] = spec
        elif planner == "groups":
            raise CannotPlanError("this version wants pages of one size")
        elif spec.kind == "mamba" and planner in ("padded", "padded-null"):
            equal[name] = replace(spec, padded=page)
        elif spec.kind != "mamba" and page % spec.page_bytes == 0:
            equal[name] = replace(spec, block_size=spec.block_size * (page // spec.page_bytes))
        elif spec.kind not in ("mamba", "mla") and planner in ("padded", "padded-null"):
            equal[name] = replace(spec, padded=page)
        else:
            raise CannotPlanError("the pages of its layers do not divide one another")
    return equal


def _kept_whole(spec: Spec) -> Spec:
    return replace(spec, kind="full", window=None) if spec.kind in ("sliding", "chunked") else spec


def _on_rank(group: Group, names: set[str]) -> Group:
    kept = [(name, spec) for name, spec in zip(group.layers, group.specs, strict=True) if name in names]
    return Group(tuple(name for name, _ in kept), tuple(spec for _, spec in kept))


def _all_kept(rank: Rank, max_model_len: int, in_flight_tokens: int) -> int:
    return sum(spec.blocks_per_request(max_model_len, in_flight_tokens) * spec.page_bytes for _, spec in rank)


def _up(number: int, step: int) -> int:
    return -(-number // step)
