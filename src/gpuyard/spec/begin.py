"""A fleet's files under another fleet's name, and what in them is an example."""

from __future__ import annotations

import re

# Addresses, names and ids that are kept for documentation (RFC 5737, RFC 2606), and the words that the examples have.
_EXAMPLE = re.compile(
    r"example|0123456789abcdef|the key's lines|ssh-\S+ \S+ operators|\b(192\.0\.2|198\.51\.100|203\.0\.113)\.[0-9]",
    re.IGNORECASE,
)


def renamed(text: str, old: str, new: str) -> str:
    """A file of the fleet `old` as one of the fleet `new`. Changed are the lines that name the fleet, and names and
    paths that the name is a part of, such as those of nodes and buckets; not a word that only reads the same."""
    old = re.escape(old)
    text = re.sub(rf"(?m)^((?:name|fleet|stack): ){old}$", rf"\g<1>{new}", text)
    return re.sub(
        rf"(?<=[-/]){old}(?![A-Za-z0-9])|(?<![A-Za-z0-9]){old}(?=-|\.yaml|\.hosts\.yaml|\.lock\.yaml)", new, text
    )


def examples(text: str) -> list[tuple[int, str]]:
    """Lines, from 1, and what stands there, that hold an example in the place of something of one's own."""
    lines = enumerate(text.splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if _EXAMPLE.search(line.partition("#")[0])]
