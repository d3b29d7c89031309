"""Who changes a fleet: one claim, kept on the first gateway, so that two never do at once. Python 3.9, nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import NoteError

VERSION = 1
CLAIM = "/var/lib/gpuyard/rollout.json"
# How long a claim is believed of which nobody here can say whether its owner lives. Longer than any state may last.
LEASE_SECONDS = 7200


class Clock(NamedTuple):
    """The gateway's: seconds since it booted, which no one sets, and which boot that was."""

    boot: str
    seconds: float


def lives(claim: dict[str, Any], clock: Clock) -> bool:
    """Whether the owner may still be there. A gateway that has booted since believes it for as long again: its owner is
    on another machine, and the gateway's own restart says nothing of that one."""
    heard = claim["heard"] if claim["boot"] == clock.boot else 0
    return bool(clock.seconds - heard < LEASE_SECONDS)


def claimed(
    claim: dict[str, Any] | None, *, wish: dict[str, Any], clock: Clock, gone: bool, take_over: bool, resume: bool
) -> dict[str, Any]:
    """The claim of who asks for it. `wish` has fleet, run, kind, target, operator and begun.

    What nobody has ended goes on under its own run, so that its record is one. `gone` says that the owner of the claim
    is known to be dead. Raises NoteError while another one changes the fleet.
    """
    mine = {**wish, "version": VERSION, "boot": clock.boot, "heard": clock.seconds, "paused": False, "result": ""}
    mine.update(halting=False, nodes=[])
    if claim is None or claim["result"]:
        return mine
    if claim["fleet"] != wish["fleet"]:
        raise NoteError(
            f"UPGRADE-FOREIGN: {CLAIM} is of fleet {claim['fleet']}, this is {wish['fleet']}. "
            "Look whose gateway this is"
        )
    owner = "{name}@{host} (process {pid})".format(**claim["operator"])
    if claim["operator"] != wish["operator"] and not take_over and not gone and lives(claim, clock):
        raise NoteError(
            f"UPGRADE-TWO: {owner} changes this fleet since {claim['begun']} ({claim['kind']} to {claim['target']}, "
            f"run {claim['run']}). Wait for its end; where its owner is gone for good, take over with "
            "-e upgrade_take_over=true"
        )
    if claim["paused"] and not resume:
        raise NoteError(
            f"UPGRADE-PAUSED: run {claim['run']} was paused. Run the same playbook with -e upgrade_resume=true to "
            "let it go on"
        )
    if (claim["kind"], claim["target"]) != (wish["kind"], wish["target"]):
        return mine
    return {**mine, "run": claim["run"], "begun": claim["begun"]}


def heard(claim: dict[str, Any] | None, *, run: str, operator: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """The claim, heard of now. Raises NoteError for who lost it."""
    if claim is None or claim["run"] != run or claim["operator"] != operator or claim["result"]:
        now = (
            "nobody"
            if claim is None or claim["result"]
            else "{name}@{host}, run {}".format(claim["run"], **claim["operator"])
        )
        raise NoteError(
            f"UPGRADE-FENCED: run {run} holds this fleet no more; {now} does. Agree with them before anything is run "
            "again"
        )
    return {**claim, "boot": clock.boot, "heard": clock.seconds}


def held(
    claim: dict[str, Any] | None, *, run: str, operator: dict[str, Any], clock: Clock, node: str
) -> dict[str, Any]:
    """The claim with one more node under way. Raises NoteError for who lost it, and where none is to be begun."""
    claim = heard(claim, run=run, operator=operator, clock=clock)
    if claim["halting"]:
        raise NoteError(
            f"UPGRADE-HALTED: {node} was not touched, because another node failed in run {run}. What is under way "
            "is ended"
        )
    if claim["paused"]:
        raise NoteError(
            f"UPGRADE-PAUSED: run {run} was paused before this node. The nodes before it are done, and all serve. Run "
            "the same playbook with -e upgrade_resume=true to let it go on"
        )
    return {**claim, "nodes": sorted({*claim["nodes"], node})}


def paused(claim: dict[str, Any] | None, run: str) -> dict[str, Any]:
    """The claim of a rollout that stops before its next node. Raises NoteError where there is none that could."""
    if claim is None or claim["result"] or (run and claim["run"] != run):
        going = f"run {claim['run']} does" if claim and not claim["result"] else "nothing does"
        raise NoteError(f"UPGRADE-NOT-RUNNING: {run or 'no run'} changes nothing now; {going}")
    return {**claim, "paused": True}


def released(
    claim: dict[str, Any] | None, *, run: str, operator: dict[str, Any], result: str, node: str = ""
) -> dict[str, Any] | None:
    """The claim given back. What somebody took over is left to them, and what a node has halted is not done.

    With `node` that one alone has come to its end. One that ends as halted lets no other begin; the fleet is given back
    when none is under way any more, for whoever came before that would change nodes that are being changed.
    """
    if claim is None or claim["result"] or claim["run"] != run or claim["operator"] != operator:
        return claim
    halting = claim["halting"] or result == "halted"
    left = [other for other in claim["nodes"] if other != node] if node else []
    over = halting and not left if node else True
    return {**claim, "halting": halting, "nodes": left, "result": ("halted" if halting else result) if over else ""}
