"""How much of the internet a list of networks lets in. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

SHORTEST = {4: 8, 6: 16}
"""Length of the shortest prefix that still names somebody, by version: the widest private network is 10.0.0.0/8."""


def too_wide(networks: Iterable[str]) -> str | None:
    """The first network that is wider than that, or that several make together; None: there is none.

    What is no network is skipped.
    """
    v4: list[ipaddress.IPv4Network] = []
    v6: list[ipaddress.IPv6Network] = []
    for text in networks:
        try:
            network = ipaddress.ip_network(text.strip(), strict=False)
        except ValueError:
            continue
        if network.prefixlen < SHORTEST[network.version]:
            return text
        if isinstance(network, ipaddress.IPv4Network):
            v4.append(network)
        else:
            v6.append(network)
    # Networks that join, such as 256 times a /8, are as wide as what they make.
    for whole in (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6)):
        if whole.prefixlen < SHORTEST[whole.version]:
            return f"{whole}, in parts"
    return None
