"""Network interfaces of a machine, card by card."""

from __future__ import annotations

from typing import Literal

from gpuyard.catalog.rows import Instance, NetworkCards
from gpuyard.spec.closed import Closed
from gpuyard.spec.fleet import Pool


class Interface(Closed):
    """One network interface at launch."""

    network_card_index: int
    device_index: int
    interface_type: Literal["interface", "efa-only"]


def layout(cards: NetworkCards | None, efa: int) -> tuple[Interface, ...]:
    """An ENA interface for IP, and `efa` EFA-only ones, which take no address. `cards`: None for a single card.

    The primary interface cannot be EFA-only, so the first card that has EFA carries it on its second device.
    """
    found = [Interface(network_card_index=0, device_index=0, interface_type="interface")]
    first = cards.first_efa_card if cards else 0
    for card in range(first, first + efa):
        device = 1 if card == 0 else (cards.further_device if cards else 0)
        found.append(Interface(network_card_index=card, device_index=device, interface_type="efa-only"))
    return tuple(found)


def efa_cards(pool: Pool, instance: Instance) -> int:
    """How many cards of each node of the pool get EFA."""
    if pool.efa is None:
        return 0
    return (pool.aws and pool.aws.network_cards) or instance.efa or 0
