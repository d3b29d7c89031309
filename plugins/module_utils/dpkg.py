"""What dpkg says of the packages of a node. Python 3.9 and the standard library alone."""

from __future__ import annotations

# What dpkg-query prints for each package, one line each.
QUERY = "${Package}\t${Architecture}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n"

GONE = ("not-installed", "config-files")
# Triggers that still wait are dpkg's everyday life, not a fault.
WHOLE = (*GONE, "installed", "triggers-pending", "triggers-awaited")


def parse_broken(text: str) -> dict[str, str]:
    """Packages that are neither whole nor gone, with their state in dpkg's word."""
    fields = [line.split("\t") for line in text.splitlines()]
    return {name: status for name, _, _, _, status in fields if status not in WHOLE}


def parse_held(text: str) -> set[str]:
    """Packages that somebody holds, also those that are not there yet."""
    fields = [line.split("\t") for line in text.splitlines()]
    return {name for name, _, _, want, _ in fields if want == "hold"}
