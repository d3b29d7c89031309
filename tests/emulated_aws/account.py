"""The emulated account: clients of moto's server, a journal of what was done, and faults on demand."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import boto3

ACCOUNT = "123456789012"


class EmulatedError(Exception):
    """A refusal that the emulated account was told to make; its text begins with EC2's code."""


class Account:
    """`folder`: journal and faults. `endpoint`: where moto listens."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self.endpoint = endpoint
        self.folder = folder
        self.region = ""
        self.client = cache(self._client)

    def _client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name=self.region or "us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id="emulated",
            aws_secret_access_key="emulated",
        )

    def journal(self, act: str, urn: str, what: str = "") -> None:
        line = json.dumps({"act": act, "name": urn.rsplit("::", 1)[-1], "type": urn.split("::")[2], "id": what})
        with (self.folder / "journal.jsonl").open("a") as file:
            file.write(line + "\n")

    def beside(self, kind: str) -> dict[str, Any]:
        """What moto has no place for, by its name."""
        path = self.folder / f"{kind}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def keep_beside(self, kind: str, name: str, what: Any) -> None:
        """Keep it there; None: take it away."""
        with (self.folder / f"{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = {**self.beside(kind), name: what}
            path = self.folder / f"{kind}.new"
            path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))
            path.replace(self.folder / f"{kind}.json")

    def asked(self, urn: str, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
        """What was last asked for of a resource: kept here, since moto does not tell all of it."""
        path = self.folder / "asked" / hashlib.sha256(urn.encode()).hexdigest()
        if inputs is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(inputs))
        return json.loads(path.read_text()) if path.is_file() else {}

    def fault(self, act: str, token: str, inputs: dict[str, Any]) -> None:
        """Wait, or refuse, as the file of faults says. Faults that are used up are taken out of it."""
        path = self.folder / "faults.json"
        if not path.is_file():
            return
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            faults = json.load(file)
            hit = next((fault for fault in faults if self._strikes(fault, act, token, inputs)), None)
            if hit is None:
                return
            hit["times"] = hit.get("times", 1) - 1
            file.seek(0)
            file.truncate()
            json.dump([fault for fault in faults if fault.get("times", 1) > 0], file)
        time.sleep(hit.get("seconds", 0))
        if hit.get("code"):
            raise EmulatedError(f"{hit['code']}: as the test asked for")

    def _strikes(self, fault: dict[str, Any], act: str, token: str, inputs: dict[str, Any]) -> bool:
        if fault["act"] != act or not token.endswith(fault["type"]):
            return False
        if "zone" not in fault:
            return True
        data = self.template(inputs["launchTemplate"]["id"])
        return (data["InstanceType"], data["Placement"]["AvailabilityZone"]) == (fault["instance"], fault["zone"])

    def template(self, template_id: str) -> dict[str, Any]:
        found = self.client("ec2").describe_launch_template_versions(LaunchTemplateId=template_id, Versions=["$Latest"])
        return found["LaunchTemplateVersions"][0]["LaunchTemplateData"]
