"""Fingerprint of an armored OpenPGP key, computed where the run starts: a wrong key never reaches a node."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: openpgp_fingerprint
short_description: Fingerprint of the one public key in an armored block
description:
  - Reads the key itself, so what is compared is what will be trusted. A block with two primary keys, or with anything
    before or after it, is refused, because only one of them would be compared.
options:
  _input:
    description: Armored public key.
    type: str
    required: true
"""

ARMOR = re.compile(
    r"\s*-----BEGIN PGP PUBLIC KEY BLOCK-----\n(?:[A-Za-z]+: [^\n]*\n)*\s*\n"
    r"(?P<body>[A-Za-z0-9+/=\n]+?)\n(?:=[A-Za-z0-9+/]{4}\n)?-----END PGP PUBLIC KEY BLOCK-----\s*"
)
PUBLIC_KEY = 6


def openpgp_fingerprint(armored: str) -> str:
    block = ARMOR.fullmatch(str(armored).replace("\r\n", "\n"))
    if block is None:
        raise AnsibleFilterError("not one armored OpenPGP public key block and nothing else")
    try:
        primary = [body for tag, body in _packets(base64.b64decode(block["body"])) if tag == PUBLIC_KEY]
    except (binascii.Error, IndexError) as wrong:
        raise AnsibleFilterError(f"the armored OpenPGP key is damaged: {wrong}") from wrong
    if len(primary) != 1:
        raise AnsibleFilterError(f"the armored block holds {len(primary)} primary keys; give exactly one")
    if primary[0][:1] != b"\x04":
        raise AnsibleFilterError("the key is not an OpenPGP version 4 key; apt's fingerprints are of version 4")
    # RFC 9580, section 5.5.4.2: the version 4 fingerprint is a SHA-1 by definition; it names a key, it signs nothing.
    framed = b"\x99" + len(primary[0]).to_bytes(2, "big") + primary[0]
    return hashlib.sha1(framed, usedforsecurity=False).hexdigest().upper()


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Packets of a binary OpenPGP stream: (tag, body). RFC 9580, section 4.2."""
    at = 0
    while at < len(data):
        header = data[at]
        at += 1
        if not header & 0x80:
            raise IndexError("no packet where one should begin")
        if header & 0x40:
            tag, first = header & 0x3F, data[at]
            if first < 192:
                size, width = first, 1
            elif first < 224:
                size, width = ((first - 192) << 8) + data[at + 1] + 192, 2
            elif first == 255:
                size, width = int.from_bytes(data[at + 1 : at + 5], "big"), 5
            else:
                raise IndexError("a packet in parts, which a key never is")
        else:
            tag, width = (header >> 2) & 0x0F, (1, 2, 4, 0)[header & 0x03]
            if not width:
                raise IndexError("a packet without a length")
            size = int.from_bytes(data[at : at + width], "big")
        body = data[at + width : at + width + size]
        if len(body) != size:
            raise IndexError("the last packet is cut short")
        yield tag, body
        at += width + size


class FilterModule:
    def filters(self) -> dict[str, Callable[[str], str]]:
        return {"openpgp_fingerprint": openpgp_fingerprint}
