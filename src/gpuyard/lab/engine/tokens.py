"""Tokens without a vocabulary, and what the engine says: the same question has the same answer, on every node.

A token is a piece of at most four bytes of text and its number is those bytes, so numbers become text again without any
table. Counts are near those of a real tokenizer for English and are not the same: the contract says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b

PIECE = re.compile(r"[A-Za-z]{1,4}| [A-Za-z]{1,3}|.", re.DOTALL)
EOS = 0
# Each with a space in front is one token.
WORDS = (
    *("air", "all", "and", "ask", "big", "box", "boy", "but", "can", "car", "cat", "day", "dog", "ear", "eat", "eye"),
    *("far", "few", "fly", "for", "fox", "fun", "get", "ice", "key", "lab", "law", "let", "low", "man", "map", "may"),
    *("men", "new", "now", "oak", "old", "one", "our", "out", "own", "pan", "pen", "put", "red", "run", "saw", "say"),
    *("sea", "see", "set", "sky", "sun", "tea", "the", "top", "two", "use", "war", "way", "who", "win", "yes", "you"),
)


def encode(text: str) -> list[int]:
    return [number_of(piece) for piece in PIECE.findall(text)]


def number_of(piece: str) -> int:
    return int.from_bytes(b"\1" + piece.encode("utf-8", "replace"), "big")


def text_of(number: int) -> str:
    """The text of one token; nothing for the end of an answer and for what is no token of ours."""
    raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return raw[1:].decode("utf-8", "replace") if raw[:1] == b"\1" and len(raw) <= 5 else ""


def dice(*parts: object) -> int:
    """A number of 64 bits that depends on what is given and on nothing else."""
    return int.from_bytes(blake2b("\0".join(map(str, parts)).encode("utf-8", "replace"), digest_size=8).digest(), "big")


def answer(prompt: object, seed: object, model: str, sample: int) -> Iterator[int]:
    """The tokens of one answer, without an end: where it would end by itself there is EOS, and it goes on behind."""
    place = 0
    while True:
        for position in range(12 + dice(prompt, seed, model, sample, "length", place) % 52):
            at = place + position
            yield number_of(" " + WORDS[dice(prompt, seed, model, sample, at) % len(WORDS)])
        place += 64
        yield EOS


def other_than(number: int, *parts: object) -> int:
    """Another word, for a token that shall be wrong."""
    words = [word for word in WORDS if number_of(" " + word) != number]
    return number_of(" " + words[dice("wrong", *parts) % len(words)])


def logprob(rank: int, *parts: object) -> float:
    """A log probability that falls with the rank."""
    return -(0.05 + rank * 1.5 + dice("logprob", rank, *parts) % 1000 / 1000)
