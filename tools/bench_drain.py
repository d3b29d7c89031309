"""Restart every engine of a fleet under load, drained and not drained, and print side by side what was lost.

The load is streams (`gpuyard bench load`), begun before the first node is touched and ended after the last one is back.
Drained, each node goes through drain_node.yml, a restart of its engines and undrain_node.yml, while the gateway is
reloaded right before the drain and in the middle of it. Not drained, the engines are just restarted. Both happen with
the fleet's `drain_seconds`, in which a stopped engine lets its requests end, and with 0.

Usage: python tools/bench_drain.py [--stack drill] [--requests 2000] [--rate 25] [--seed N] [--only WAY...]
Exit code 0 only if nothing was lost where nodes were drained, and the ledger shows losses where they were not.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuyard.lab.own_fleet import CommandError, OwnFleet, wait
from gpuyard.spec.loader import load_fleet
from tools.project import PROJECT

OUTCOMES = ("complete", "failed", "truncated", "duplicated", "wrong")
DROP_IN = "/run/systemd/system/vllm@.service.d/zz-bench-drain.conf"


@dataclass(frozen=True)
class Way:
    """One way to restart all engines."""

    name: str
    drained: bool
    drain_seconds: int | None
    """None: what the fleet says."""


WAYS = [
    Way("drained", True, None),
    Way("drained, drain_seconds 0", True, 0),
    Way("not drained", False, None),
    Way("not drained, drain_seconds 0", False, 0),
]


@dataclass
class Drill:
    """A fleet of the lab, its nodes, and what is done to them."""

    own: OwnFleet

    def __post_init__(self) -> None:
        stack, project = self.own.stack, self.own.project
        fleet = load_fleet(project / f"fleets/{stack}.yaml")
        self.url = f"http://127.0.0.1:{fleet.gateway.port}"
        self.key = project / f".gpuyard/secrets/{stack}/api_key"
        self.nodes = [f"{stack}-{pool.name}-{number}" for pool in fleet.pools for number in range(pool.nodes)]
        self.gateway = f"{stack}-gateway-0"
        self.port = fleet.models[0].port
        self.units = " ".join(f"vllm@{model.name}.service" for model in fleet.models)

    def on(self, node: str, line: str) -> str:
        return self.own.on(node, line)

    def playbook(self, name: str, node: str) -> None:
        self.own.played(f"operate/{name}", "--limit", node)

    def servers(self) -> dict[str, str]:
        """Each node's status at the gateway."""
        told = self.on(self.gateway, "python3 /usr/local/lib/gpuyard/gateway_state.py servers")
        return {server["server"]: server["status"] for server in json.loads(told)}

    def all_up(self) -> None:
        wait("all engines to be up at the gateway", lambda: set(self.servers().values()) == {"UP"})

    def restart(self, node: str, when: str = "true") -> None:
        """Restart the node's engines as soon as a shell line there succeeds, after 30 s at the latest."""
        pids = f"systemctl show -p MainPID --value {self.units}"
        before = self.on(node, pids)
        self.on(node, f"for i in $(seq 600); do {when} && break; sleep 0.05; done; systemctl restart {self.units}")
        if self.on(node, pids) == before:
            raise CommandError(f"the engines of {node} still run as {before.split()}: they were not restarted")

    def restart_drained(self, node: str) -> None:
        reload = "systemctl reload haproxy"
        self.on(self.gateway, reload)
        with ThreadPoolExecutor(1) as beside:
            drain = beside.submit(self.playbook, "drain_node", node)
            wait(f"{node} to be closed", lambda: drain.done() or self.servers()[node] != "UP")
            self.on(self.gateway, reload)
            drain.result()
        self.restart(node)
        self.playbook("undrain_node", node)

    def restart_undrained(self, node: str) -> None:
        # In the midst of streams: an engine that has none at the moment loses none.
        self.restart(node, f"[ $(ss -Htn state established sport = :{self.port} | wc -l) -ge 3 ]")
        self.all_up()

    @contextmanager
    def drain_seconds(self, seconds: int | None) -> Generator[None]:
        """Engines with another `drain_seconds` than the fleet's, until the nodes are booted again at the latest."""
        if seconds is None:
            yield
            return
        # As the role computes it: systemd waits 15 s longer.
        lines = f"[Service]\nEnvironment=GPUYARD_DRAIN_SECONDS={seconds}\nTimeoutStopSec={seconds + 15}\n"
        put = f"mkdir -p {Path(DROP_IN).parent} && printf '{lines}' > {DROP_IN}"
        try:
            self.on_all(f"{put} && systemctl daemon-reload && systemctl restart {self.units}")
            yield
        finally:
            self.on_all(f"rm -f {DROP_IN} && systemctl daemon-reload && systemctl restart {self.units}")

    def on_all(self, line: str) -> None:
        for node in self.nodes:
            self.on(node, line)
        self.all_up()

    @contextmanager
    def load(self, requests: int, rate: float, seed: int, told: dict[str, Any]) -> Generator[None]:
        """Load from before the block until after it, and at least so many requests; `told` gets the report."""
        with tempfile.TemporaryDirectory() as folder:
            ledger, answer = Path(folder) / "ledger", Path(folder) / "report"
            options = ["--rate", str(rate), "--duration", "1200", "--seed", str(seed), "--mix", "streamed=1"]
            files = ["--key-file", str(self.key), "--ledger", str(ledger)]
            with answer.open("w") as out:
                child = subprocess.Popen(
                    self.own.words(
                        "gpuyard", "bench", "load", self.url, *options, *files, "--long-tokens", "64", "--json"
                    ),
                    cwd=self.own.project,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.DEVNULL,
                )

            def booked() -> int:
                return ledger.read_bytes().count(b"\n") if ledger.is_file() else 0

            try:
                wait("the load to begin", lambda: child.poll() is not None or booked() > 2 * rate)
                yield
                wait("the load to end", lambda: child.poll() is not None or booked() >= requests, 1200)
                if child.poll() is not None:
                    raise CommandError(
                        f"the load ended by itself with {child.returncode}: {answer.read_text()[-1000:]}"
                    )
                # The first one lets what runs end.
                child.send_signal(signal.SIGINT)
                child.wait(180)
                told |= json.loads(answer.read_text())
                told["lines"] = [json.loads(line) for line in ledger.read_text().splitlines()]
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()

    def walk(self, way: Way, requests: int, rate: float, seed: int, nodes: Sequence[str] = ()) -> dict[str, Any]:
        """Restart the engines of these nodes, or of all, under load; the load's report, with the ledger's lines."""
        self.all_up()
        told: dict[str, Any] = {}
        with self.drain_seconds(way.drain_seconds), self.load(requests, rate, seed, told):
            began = time.monotonic()
            for node in nodes or self.nodes:
                (self.restart_drained if way.drained else self.restart_undrained)(node)
            told["walk_seconds"] = round(time.monotonic() - began, 1)
        return told


def table_of(reports: dict[Way, dict[str, Any]]) -> Table:
    table = Table("streamed requests, all engines restarted", *(way.name for way in reports))
    for name in ("requests", *OUTCOMES, "unended"):
        table.add_row(name, *(str(told[name]) for told in reports.values()))
    for name, key in (("time to first token", "ttft"), ("between tokens", "itl")):
        spreads = [told[f"{key}_seconds"] for told in reports.values()]
        shown = (f"{spread['p50'] * 1000:.0f} / {spread['p99'] * 1000:.0f} ms" for spread in spreads)
        table.add_row(f"{name}, p50 / p99", *shown)
    table.add_row("tokens/s", *(str(told["tokens_per_second"]) for told in reports.values()))
    table.add_row("all engines restarted in", *(f"{told['walk_seconds']} s" for told in reports.values()))
    return table


def main() -> int:
    """Walk each way, print what it lost, then all side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", default="drill")
    parser.add_argument("--requests", type=int, default=2000, help="at least so many in each way")
    parser.add_argument("--rate", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[way.name for way in WAYS])
    options = parser.parse_args()
    drill = Drill(OwnFleet(options.stack, PROJECT, port=0))
    reports: dict[Way, dict[str, Any]] = {}
    for way in WAYS:
        if options.only and way.name not in options.only:
            continue
        print(f"{way.name}: {options.rate:g} requests/s, seed {options.seed}", flush=True)
        reports[way] = told = drill.walk(way, options.requests, options.rate, options.seed)
        reasons = Counter((line["outcome"], line["why"][:100]) for line in told["lines"] if line["why"])
        for (outcome, why), number in reasons.most_common(5):
            print(f"  {number} {outcome}: {why}", flush=True)
    Console(width=140).print(table_of(reports))
    kept = all(told["lossless"] for way, told in reports.items() if way.drained)
    shown = all(not told["lossless"] for way, told in reports.items() if not way.drained)
    if not kept:
        print("LOST: requests were lost although nodes were drained")
    if not shown:
        print("EMPTY: nothing was lost without a drain either, so this run shows nothing of it")
    return 0 if kept and shown else 1


if __name__ == "__main__":
    sys.exit(main())
