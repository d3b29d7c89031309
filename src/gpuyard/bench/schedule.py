"""What is asked and when: the same seed gives the same requests in the same order, on any machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

WORDS = ["amber", "bridge", "cedar", "delta", "ember", "garden", "harbor", "island", "lantern", "meadow", "nickel"]


class Kind(StrEnum):
    SHORT = "short"
    """A short prompt, few tokens, the answer in one piece."""
    LONG = "long"
    """A long prompt, many tokens, the answer in one piece."""
    STREAMED = "streamed"
    """The same as a stream."""


@dataclass(frozen=True, slots=True)
class Prompt:
    name: str
    text: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    kind: Kind
    prompt: Prompt
    due: float
    """Seconds after the first request; 0 where no rate is asked for."""

    @property
    def streamed(self) -> bool:
        return self.kind is Kind.STREAMED


def prompts(seed: int, each: int, short_tokens: int, long_tokens: int) -> dict[Kind, list[Prompt]]:
    """`each` short and `each` long prompts. Streams ask the long ones, so that both forms answer to one reference."""
    dice = random.Random(f"prompts {seed}")  # noqa: S311 - dice, not a secret

    def pool(name: str, words: int, max_tokens: int) -> list[Prompt]:
        return [
            Prompt(
                name=f"{name}-{number}",
                text=f"List {number}: {' '.join(dice.choices(WORDS, k=words))}. Say something of each word.",
                max_tokens=max_tokens,
            )
            for number in range(each)
        ]

    long = pool("long", 120, long_tokens)
    return {Kind.SHORT: pool("short", 8, short_tokens), Kind.LONG: long, Kind.STREAMED: long}


def requests(
    seed: int, mix: Mapping[Kind, float], pools: Mapping[Kind, list[Prompt]], rate: float | None
) -> Iterator[Request]:
    """Requests without end. With a rate they come as from many people who do not know each other (Poisson)."""
    dice = random.Random(f"requests {seed}")  # noqa: S311 - dice, not a secret
    kinds, weights = list(mix), list(mix.values())
    due = 0.0
    for number in count():
        kind = dice.choices(kinds, weights)[0]
        yield Request(number, kind, dice.choice(pools[kind]), due)
        if rate:
            due += dice.expovariate(rate)


def mix_of(text: str) -> dict[Kind, float]:
    """`short=1,streamed=3` as weights. ValueError says what is wrong with it."""
    mix: dict[Kind, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in list(Kind):
            raise ValueError(f"{name!r} is none of {', '.join(Kind)}")
        if Kind(name) in mix:
            raise ValueError(f"{name} stands there twice")
        try:
            mix[Kind(name)] = float(weight or 1)
        except ValueError:
            raise ValueError(f"{weight!r} is no number") from None
        if not 0 <= mix[Kind(name)] < float("inf"):
            raise ValueError(f"{name} cannot have the weight {weight}")
    if not sum(mix.values()):
        raise ValueError("every weight is 0")
    return mix
