"""The repository's fleets of AWS, and changes to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpuyard.provision.refusals import Machines
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import load_fleet

FLEETS = Path(__file__).parents[2] / "fleets"
NAMES = sorted(path.stem for path in FLEETS.glob("aws-*.yaml") if not path.stem.endswith(".lock"))
MACHINES = Machines.known()
BLOCK = "reservation: cr-0123456789abcdef0, block_ends: 2026-12-07T11:30:00Z"
IN_A_BLOCK = (
    ("purchase: on-demand", "purchase: capacity-block"),
    ("zones: [us-east-1a]}", f"zones: [us-east-1a], {BLOCK}}}"),
)


def fleet_of(name: str) -> Fleet:
    return load_fleet(FLEETS / f"{name}.yaml")


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Fleet]:
    """One of the fleets with texts of its spec exchanged."""

    def of(name: str, *changes: tuple[str, str]) -> Fleet:
        text = (FLEETS / f"{name}.yaml").read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return load_fleet(path)

    return of
