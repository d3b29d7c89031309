"""Every fault, injected into a real node and mended: seen by ordinary tools while it lasts, and gone without a trace.

GPUYARD_FAULT_ROUNDS and GPUYARD_SEED choose how often and in which order (`make bench-faults`).
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuyard.lab import agent, host
from gpuyard.lab.faults import record, rim
from gpuyard.lab.faults.model import CONTROLLER, Injection
from gpuyard.lab.faults.table import FAULTS
from gpuyard.lab.models import NodeState
from gpuyard.lab.place import read_json
from tools.bench_kill import STATE

from .conftest import Lab, refused
from .test_gpu_node import DRIVER, UPDATE, install, name_repository, play

pytestmark = pytest.mark.lab
VERSION = "580.126.20"

# Parameters other than the defaults where the test's node needs them, or where they show more.
WORDS: Mapping[str, list[str]] = {
    "xid": ["code=999", "times=3"],
    "partition": ["direction=out"],
    "link-flaps": ["times=2", "down_seconds=0.1"],
    "slow-link": ["delay_ms=300"],
    "apt-lock": ["seconds=600"],
}

# What an operator could tell two nodes apart by, beyond packages and files: what runs, routes, rules, mounts, modules.
NOW = r"""
find /var/lib/gpuyard* /run/gpuyard-lab /lib/modules/gpuyard-lab -type f ! -name '*.lock' ! -path '*/processes/*' \
  2>/dev/null | sort | xargs -r sha256sum
find /var/lib/gpuyard* /usr/local/lib/gpuyard* /run/systemd/system /dev/nvidia* | sort
find /run/systemd/transient -mindepth 1
systemctl list-units --all --plain --no-legend --type=service,socket,mount,timer,swap | awk '
  $3 != "inactive" && $1 !~ /^(user|session|run-user|run-credentials|modprobe|systemd-tmpfiles-clean)/ {
    print $1, $2, $3, $4
  }'
ip -4 addr show dev host0 | awk '/inet/ {print $2}'
ip route
nft list ruleset
findmnt -rn -o TARGET,FSTYPE,OPTIONS | grep -Ev '^/run/(user|credentials)' | sed s/,uuid=on// | sort
lsmod
tc qdisc show
df --output=target | sort
ss -Hltn | awk '{print $4}' | sort
dpkg --audit
"""


@dataclass
class Yard:
    """A lab with a node that has everything there is to break, and one beside it."""

    lab: Lab
    node: NodeState
    peer: NodeState

    def state(self) -> list[str]:
        return self.lab.said(self.node, f"({STATE}); ({NOW})").splitlines()

    def settled(self, before: list[str]) -> list[str]:
        """How the node differs from before, after it had a moment for what mending only begins."""
        now: list[str] = []

        def same() -> bool:
            now[:] = self.state()
            return now == before

        host.wait_until(same, 20, 0.5)
        return sorted(set(now) ^ set(before))

    def answers(self, prompt: str = "Hello", tokens: int = 20) -> str:
        """The status of one request to the engine, asked from the node beside it."""
        return self.asks(prompt, tokens)[0]

    def asks(self, prompt: str = "Hello", tokens: int = 20) -> tuple[str, str, float]:
        """Status, text and seconds of one request, asked from the node beside it."""
        body = json.dumps({"model": "t", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True})
        done = self.lab.on(
            self.peer,
            f"curl -s -m 5 -w '\\n%{{http_code}} %{{time_total}}' -H 'Content-Type: application/json' "
            f"-d '{body}' http://{self.node.address}:8000/v1/completions",
        )
        *said, last = done.stdout.splitlines() or [""]
        status, seconds = [*last.split(), "000", "0"][:2]
        text = json.loads("".join(said))["choices"][0]["text"] if status == "200" else ""
        return status, text, float(seconds)

    def streams(self) -> str:
        """How curl ended a streamed answer: 0 is whole."""
        body = json.dumps({"model": "t", "prompt": "Hello", "max_tokens": 60, "stream": True, "ignore_eos": True})
        return self.lab.said(
            self.peer,
            "curl -s -N -o /dev/null -w '%{exitcode}' -H 'Content-Type: application/json' "
            f"-d '{body}' http://{self.node.address}:8000/v1/completions || true",
        )

    def injection(self, fault: str, seed: int = 0, node: NodeState | None = None) -> Injection:
        words = rim.values_in(WORDS.get(fault, []))
        return FAULTS[fault].chosen((node or self.node).spec, None, seed, words)

    def sees(self, fault: str) -> bool:
        return rim.seen(self.lab.place, self.node.name, self.injection(fault))

    def breaks(self, fault: str, *words: str, seed: int = 0, after: float = 0) -> None:
        agent.fault_break(self.lab.ref, self.node.name, fault, None, seed, list(words or WORDS.get(fault, [])), after)

    def mends(self, fault: str | None) -> list[str]:
        return agent.fault_mend(self.lab.ref, self.node.name, fault)

    def on_this_machine(self) -> dict[str, object]:
        """What the lab has on this machine, beyond its nodes."""
        place = self.lab.place

        def ours(*words: str) -> list[str]:
            said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
            return [line for line in said.splitlines() if place.id in line]

        table = subprocess.check_output(["nft", "-s", "list", "table", "ip", place.table], text=True)
        faults = [
            path for folder in (record.folder(place), place.views) for path in folder.rglob("*") if path.is_file()
        ]
        return {
            "tables": ours("nft", "list", "tables"),
            "table": table,
            "qdiscs": [line.split(" ")[1] for line in ours("tc", "qdisc", "show")],
            "groups": sorted(path.name for path in host.cgroup_of(place, "x").parent.glob("*") if path.is_dir()),
            "files": [path.name for path in faults],
            "mounts": {
                line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if place.id in line
            },
        }


# The simulated engine under the name and with the variables of a fleet's.
ENGINE = """
[Service]
Environment=GPUYARD_ENGINE=/opt/vllm/{tree} GPUYARD_PORT=8000
ExecStart=/opt/vllm/{tree}/bin/python -I -m vllm.entrypoints.openai.api_server --model /srv/model \
  --served-model-name %i --host 0.0.0.0 --port 8000 --inter-token-latency 5
DevicePolicy=closed
DeviceAllow=char-* rw
Restart=always
RestartSec=1
"""
MODEL = {
    "max_position_embeddings": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}


@pytest.fixture(scope="module")
def yard(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Yard:
    lab.up()
    node, peer = lab.gpu("t-faults-0"), lab.gateway()
    name_repository(lab, node)
    done = play(lab, node, tmp_path_factory.mktemp("play"))
    assert "failed=0" in done, done
    lab.said(node, f"{UPDATE} && {install(VERSION)} && apt-mark hold {DRIVER}")
    lab.said(
        node,
        "modprobe -a nvidia nvidia_uvm && systemctl enable -q nvidia-fabricmanager && "
        "systemctl restart nvidia-persistenced nvidia-fabricmanager",
    )
    tree = max((lab.place.cache / "engines").glob("vllm-sim-*[0-9a-f]"), key=lambda path: path.stat().st_mtime).name
    files = {"/srv/model/config.json": json.dumps(MODEL), "/etc/systemd/system/vllm@.service": ENGINE.format(tree=tree)}
    for path, text in files.items():
        lab.said(node, f"mkdir -p {Path(path).parent} && cat > {path} <<'EOF'\n{text}\nEOF")
    wants = "/etc/systemd/system/multi-user.target.wants"
    lab.said(node, f"mkdir -p {wants} && ln -sf ../vllm@.service {wants}/vllm@t.service && systemctl daemon-reload")
    made = Yard(lab, node, peer)
    # What a boot brings and what hands have begun are to be the same.
    made.breaks("power-cut")
    made.mends("power-cut")
    assert host.wait_until(
        lambda: lab.on(node, "systemctl is-active -q vllm@t nvidia-fabricmanager").returncode == 0, 60
    )
    return made


@pytest.fixture(autouse=True)
def whole(yard: Yard) -> Iterator[None]:
    yield
    yard.mends(None)


ON_NODES = [fault.id for fault in FAULTS.values() if fault.target != CONTROLLER]


def test_each_fault_is_seen_while_it_lasts_and_the_node_is_as_before(yard: Yard) -> None:
    seed = int(os.environ.get("GPUYARD_SEED", random.randrange(10**6)))  # noqa: S311 - dice, not secrets
    dice = random.Random(seed)  # noqa: S311
    print(f"GPUYARD_SEED={seed}")
    before, machine = yard.state(), yard.on_this_machine()
    wrong: list[str] = []
    for round_ in range(int(os.environ.get("GPUYARD_FAULT_ROUNDS", "1"))):
        began = time.monotonic()
        for fault in dice.sample(ON_NODES, len(ON_NODES)):
            if yard.sees(fault):
                wrong.append(f"{fault}: seen before it is broken")
            yard.breaks(fault, seed=dice.randrange(1000))
            if not yard.sees(fault):
                wrong.append(f"{fault}: not seen while it lasts")
            yard.mends(fault)
            if yard.sees(fault):
                wrong.append(f"{fault}: seen after it is mended")
            wrong += [f"{fault}: left {line}" for line in yard.settled(before)]
        print(f"round {round_ + 1}: {len(ON_NODES)} faults in {time.monotonic() - began:.0f} s")
    assert wrong == []
    assert yard.on_this_machine() == machine


# --- what single faults do to those who use the node ------------------------------------------------------


def test_an_engine_is_wrong_slow_poisoned_or_silent_as_it_is_told(yard: Yard) -> None:
    status, right, quick = yard.asks(tokens=60)
    assert status == "200"
    yard.breaks("engine-wrong-tokens", "rate=0.2", seed=7)
    assert yard.asks(tokens=60)[1] != right
    wrong = yard.asks(tokens=60)[1]
    yard.breaks("engine-slow", "factor=4")
    _, both, slow = yard.asks(tokens=60)
    assert slow > 2 * quick, "two faults of one engine last side by side"
    assert both == wrong, "the seed chooses which tokens are wrong"
    yard.mends("engine-wrong-tokens")
    assert yard.asks(tokens=60)[1] == right
    yard.mends("engine-slow")
    yard.breaks("engine-poisoned", "prompt=boo")
    assert yard.answers("boo") == "500"
    yard.mends("engine-poisoned")
    assert host.wait_until(lambda: yard.answers("boo") == "200", 30, 0.3)


def test_an_engine_that_cannot_start_says_why_and_starts_when_it_is_mended(yard: Yard) -> None:
    yard.breaks("engine-cuda-error", "error=803")
    assert host.wait_until(lambda: yard.answers() == "000", 30, 0.3)
    said = "journalctl -u vllm@t -o cat | grep -q 'Error 803: system has unsupported display driver'"
    assert host.wait_until(lambda: yard.lab.on(yard.node, said).returncode == 0, 20, 0.5)
    yard.mends("engine-cuda-error")
    assert host.wait_until(lambda: yard.answers() == "200", 30, 0.3)


def test_a_kernel_line_is_in_the_journal_as_the_kernels_own(yard: Yard) -> None:
    """Field by field as a kernel's line: what reads Xids from the journal cannot tell."""
    yard.breaks("xid", "code=79")
    found = yard.lab.said(yard.node, "journalctl --sync; journalctl -k -o json -n 1 --no-pager")
    entry = json.loads(found)
    assert (
        entry["MESSAGE"]
        == "NVRM: Xid (PCI:0000:19:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    )
    assert entry["_TRANSPORT"] == "kernel"
    assert (entry["SYSLOG_IDENTIFIER"], entry["SYSLOG_FACILITY"], entry["PRIORITY"]) == ("kernel", "0", "3")
    assert not {"_PID", "_UID", "_COMM", "_SYSTEMD_UNIT", "SYSLOG_PID"} & entry.keys(), "a process wrote it"
    booted = float(yard.lab.said(yard.node, "cut -d' ' -f1 /proc/uptime"))
    assert abs(int(entry["_SOURCE_MONOTONIC_TIMESTAMP"]) / 1e6 - booted) < 60


def test_kernel_lines_come_in_order_and_once_also_after_the_journal_was_restarted(yard: Yard) -> None:
    yard.breaks("xid", "code=1001", "times=50")
    yard.mends("xid")
    yard.lab.said(yard.node, "systemctl restart systemd-journald")
    yard.breaks("xid", "code=1002", "times=50")
    lines = yard.lab.said(yard.node, "journalctl --sync; journalctl -k -o cat -n 100 --no-pager").splitlines()
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["1001"] * 50 + ["1002"] * 50


def test_a_package_that_cannot_be_configured_stays_half_configured_for_its_installer(yard: Yard) -> None:
    before = yard.state()
    yard.breaks("dkms-build-fails")
    done = yard.lab.on(
        yard.node,
        f"{UPDATE} >/dev/null && {install('580.105.08', '--allow-downgrades', '--allow-change-held-packages')}",
    )
    assert done.returncode == 100
    assert "Bad return status for module build on kernel" in done.stdout + done.stderr
    assert (
        yard.lab.said(yard.node, "dpkg-query -W -f '${db:Status-Status}' nvidia-kernel-open-dkms") == "half-configured"
    )
    yard.mends("dkms-build-fails")
    back = install(VERSION, "--allow-downgrades", "--allow-change-held-packages")
    hold = f"apt-mark hold {DRIVER} && systemctl restart nvidia-persistenced"
    yard.lab.said(yard.node, f"{UPDATE} >/dev/null && {back} && {hold}")
    assert yard.settled(before) == []


@pytest.mark.parametrize("stage", ["half-installed", "unpacked", "half-configured"])
def test_dpkg_is_killed_at_the_stage_that_was_chosen(yard: Yard, stage: str) -> None:
    before = yard.state()
    yard.breaks("dpkg-interrupted", f"stage={stage}")
    assert yard.lab.said(yard.node, "dpkg-query -W -f '${db:Status-Status}' nvidia-persistenced") == stage
    assert yard.lab.on(yard.node, "apt-get install -y nvidia-persistenced").returncode != 0
    yard.mends(None)
    assert yard.settled(before) == []


def test_what_was_changed_on_a_full_disk_is_there_after_it_was_mended(yard: Yard) -> None:
    yard.lab.said(yard.node, "mkdir -p /var/lib/t && echo old > /var/lib/t/old && echo kept > /var/lib/t/kept")
    yard.breaks("disk-full", "free_kib=64")
    assert "No space left" in yard.lab.on(yard.node, "head -c 1M /dev/zero > /var/lib/t/large").stderr
    yard.lab.said(
        yard.node, "rm /var/lib/t/large /var/lib/t/old && echo new > /var/lib/t/new && echo more >> /var/lib/t/kept"
    )
    yard.mends("disk-full")
    assert yard.lab.said(yard.node, "cd /var/lib/t && grep . * && rm -r /var/lib/t") == "kept:kept\nkept:more\nnew:new"


def test_a_partition_may_be_one_way_and_between_two_nodes_alone(yard: Yard) -> None:
    ping = f"ping -c1 -W1 -q {yard.peer.address}"
    yard.breaks("partition", "direction=in", f"peer={yard.peer.name}")
    assert yard.lab.on(yard.node, ping).returncode != 0
    assert yard.lab.on(yard.node, "true").returncode == 0, "this machine still reaches it"
    yard.mends("partition")
    assert yard.lab.on(yard.node, ping).returncode == 0
    yard.breaks("partition")
    with refused("FAULT-UNREACHABLE"):
        yard.breaks("xid")
    yard.mends("partition")


def test_a_slow_link_delays_loses_and_breaks_as_its_seed_says(yard: Yard) -> None:
    quick = yard.asks(tokens=1)[2]
    yard.breaks("slow-link", "ports=8000", "delay_ms=400")
    assert yard.asks(tokens=1)[2] > quick + 0.7, "each way"
    yard.mends("slow-link")
    seen: list[list[str]] = []
    for _ in range(2):
        yard.breaks("slow-link", "ports=8000", "delay_ms=0", "cut=0.5", seed=5)
        seen.append([yard.streams() for _ in range(8)])
        yard.mends("slow-link")
    assert seen[0] == seen[1]
    assert seen[0].count("0") in range(1, 8), "some break, some do not"


def test_a_rate_limit_limits(yard: Yard) -> None:
    yard.lab.said(
        yard.node,
        "head -c 300k /dev/zero > /srv/t && systemd-run -q --collect --unit=t-web python3 -m http.server -d /srv 8123",
    )
    fetch = f"curl -s -o /dev/null --retry 5 --retry-connrefused -w '%{{time_total}}' http://{yard.node.address}:8123/t"
    assert float(yard.lab.said(yard.peer, fetch)) < 1
    yard.breaks("rate-limit", "kbit=1000")
    assert float(yard.lab.said(yard.peer, fetch)) > 1.5
    yard.mends("rate-limit")
    assert float(yard.lab.said(yard.peer, fetch)) < 1
    yard.lab.said(yard.node, "systemctl stop t-web; rm /srv/t")


def test_a_daemon_that_does_not_stop_is_killed_when_its_time_is_up(yard: Yard) -> None:
    yard.breaks("persistenced-stop-hangs", "seconds=3")
    began = time.monotonic()
    yard.lab.on(yard.node, "systemctl stop nvidia-persistenced")
    assert time.monotonic() - began > 2.5
    yard.mends("persistenced-stop-hangs")
    assert yard.lab.said(yard.node, "systemctl is-active nvidia-persistenced") == "active"


# --- later, twice, killed, by hand ------------------------------------------------------------------------


def test_a_fault_that_waits_breaks_after_its_command_has_ended(yard: Yard) -> None:
    yard.breaks("gpu-lost", after=2)
    assert [row["stage"] for row in rim.read(yard.lab.place)] == ["waiting"]
    assert not yard.sees("gpu-lost")
    assert host.wait_until(lambda: yard.sees("gpu-lost"), 20, 0.3)
    yard.mends("gpu-lost")
    yard.breaks("power-cut", after=3600)
    assert yard.mends(None) == ["power-cut"]
    assert rim.read(yard.lab.place) == []
    assert not [path for path in record.folder(yard.lab.place).rglob("*power-cut*") if "log" not in path.name]


def test_a_fault_is_broken_once_and_only_a_broken_one_is_mended(yard: Yard) -> None:
    with refused("FAULT-WHOLE"):
        yard.mends("gpu-hot")
    yard.breaks("gpu-hot")
    with refused("FAULT-TWICE"):
        yard.breaks("gpu-hot")
    assert yard.mends(None) == ["gpu-hot"]
    assert yard.mends(None) == []


def test_two_that_break_at_once_come_one_after_the_other(yard: Yard) -> None:
    call = (
        "import sys; from pathlib import Path; from gpuyard.lab import agent; "
        "agent.fault_break(agent.LabRef(project=Path(sys.argv[1]), stack=sys.argv[2]), *sys.argv[3:5], None, 0, [], 0)"
    )
    ref = yard.lab.ref
    started = [
        subprocess.Popen([sys.executable, "-c", call, str(ref.project), ref.stack, yard.node.name, fault])
        for fault in ("gpu-hot", "remap-pending", "gpu-hot")
    ]
    codes = [process.wait(60) for process in started]
    assert codes[1] == 0
    assert sorted([codes[0], codes[2]]) == [0, 1], "one of the two was the second"
    assert yard.mends(None) == ["gpu-hot", "remap-pending"]


@pytest.mark.parametrize(
    "fault", ["driver-library-newer", "disk-full", "secure-boot", "power-cut", "repository-key-rotated"]
)
def test_a_break_killed_at_any_moment_is_mended_to_the_state_before(yard: Yard, fault: str) -> None:
    before, machine = yard.state(), yard.on_this_machine()
    call = (
        "import sys; from pathlib import Path; from gpuyard.lab import agent; "
        "agent.fault_break(agent.LabRef(project=Path(sys.argv[1]), stack=sys.argv[2]), *sys.argv[3:5], None, 0, [], 0)"
    )
    dice = random.Random(fault)  # noqa: S311
    words = [sys.executable, "-c", call, str(yard.lab.ref.project), yard.lab.ref.stack, yard.node.name, fault]
    breaker = subprocess.Popen(words)
    host.wait_until(lambda: fault in record.read(yard.lab.place, yard.node.name), 20, 0.01)
    time.sleep(dice.uniform(0, 1.5))
    breaker.kill()
    breaker.wait()
    assert yard.mends(None) == [fault]
    assert yard.settled(before) == []
    assert yard.on_this_machine() == machine


def test_a_record_changed_by_hand_is_not_believed_and_everything_is_mended(yard: Yard) -> None:
    before = yard.state()
    yard.breaks("gpu-hot")
    path = record.folder(yard.lab.place) / f"{yard.node.name}.json"
    path.write_text(path.read_text().replace('"94"', '"95"'))
    with refused("FAULT-STATE"):
        yard.breaks("xid")
    with refused("FAULT-STATE"):
        yard.mends("gpu-hot")
    assert len(yard.mends(None)) == len(ON_NODES)
    assert yard.settled(before) == []


def test_a_patch_that_nobody_broke_is_refused(yard: Yard) -> None:
    folder = "/var/lib/gpuyard-lab/faults.d"
    yard.lab.said(yard.node, f"mkdir -p {folder} && echo '{{}}' > {folder}/by-hand.json")
    with refused("FAULT-STATE"):
        yard.breaks("gpu-hot")
    yard.lab.said(yard.node, f"rm -r {folder}")


def test_a_node_without_what_a_fault_breaks_is_refused(yard: Yard) -> None:
    for fault in ("engine-hangs", "repository-key-rotated"):
        with refused("FAULT-NEEDS"):
            agent.fault_break(yard.lab.ref, yard.peer.name, fault, None, 0, [], 0)
    assert record.read(yard.lab.place, yard.peer.name) == {}


def test_a_lab_of_another_format_is_refused(yard: Yard) -> None:
    path = yard.lab.place.state / "lab.json"
    text = path.read_text()
    found = read_json(path) or {}
    del found["format"]
    path.write_text(json.dumps(found))
    try:
        with refused("LAB-FORMAT"):
            yard.breaks("xid")
        yard.lab.up()
        with refused("LAB-FORMAT"):
            yard.breaks("xid")
    finally:
        path.write_text(text)


def test_a_node_that_is_removed_takes_its_faults_with_it(yard: Yard) -> None:
    before = yard.on_this_machine()
    gone = yard.lab.gateway("t-gone")
    for fault, after in (("partition", 0), ("apt-lock", 3600)):
        agent.fault_break(yard.lab.ref, gone.name, fault, None, 0, [], after)
    assert yard.on_this_machine() != before
    agent.node_down(yard.lab.ref, gone.name)
    assert rim.read(yard.lab.place) == []
    assert yard.on_this_machine()["tables"] == before["tables"]
    assert not list((record.folder(yard.lab.place) / "waiting").glob("t-gone*"))
