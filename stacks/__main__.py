"""Provision one fleet: its spec and its lock in, machines and the output `handover` out."""

import importlib
from pathlib import Path

import pulumi

from gpuyard.plan.lock import check_lock, load_lock, lock_path
from gpuyard.spec.errors import RefusedError
from gpuyard.spec.loader import load_fleet

PROJECT = Path(__file__).resolve().parent.parent
LAYOUTS = {"lab": "LabFleet", "aws": "AwsFleet"}
"""The class of each provider, in the module of its name: a fleet of the lab does without the SDK of a cloud."""


def provision() -> None:
    stack = pulumi.get_stack()
    fleet_file = PROJECT / (pulumi.Config().get("fleet") or f"fleets/{stack}.yaml")
    try:
        fleet = load_fleet(fleet_file)
        if fleet.provider not in LAYOUTS:
            known = " or ".join(LAYOUTS)
            why = f"machines can be made by {known} only: what others have can be checked and locked"
            raise RefusedError("STACK-PROVIDER", f"provider {fleet.provider}", why, f"set provider to {known}")
        check_lock(load_lock(lock_path(fleet_file)), fleet)
        layout_of = getattr(importlib.import_module(f"stacks.layouts.{fleet.provider}"), LAYOUTS[fleet.provider])
        layout = layout_of(fleet, project=PROJECT, stack=stack)
    except RefusedError as refused:
        raise pulumi.RunError(str(refused)) from refused
    pulumi.export("handover", layout.handover)


provision()
