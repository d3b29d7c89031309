"""Faults of cables, power and disks, and of the machine from which the fleet is run."""

from __future__ import annotations

from importlib import resources

from gpuyard.lab.faults.model import (
    CONTROLLER,
    Cut,
    Dark,
    Fault,
    Flaps,
    Injection,
    Killed,
    OnNode,
    Parameter,
    Probe,
    Rate,
    Step,
    Truncated,
)
from gpuyard.lab.faults.words import helper, kernel

LINK_PORT = 15999


def cut(injection: Injection) -> tuple[Step, ...]:
    return (Cut(injection["direction"], injection["peer"]),)


def no_way(injection: Injection) -> Probe:
    """Between this machine and the node nothing passes; where only a peer is cut off, the node is asked."""
    if injection["peer"] in ("all", "host"):
        return Probe("! answers", "host")
    return Probe(f"$login ! ping -c1 -W1 -q $peer_{injection['peer'].replace('-', '_')} >/dev/null 2>&1", "host")


def slow_link(injection: Injection) -> tuple[Step, ...]:
    program = resources.files(__package__).joinpath("slow_link.py").read_text()
    table = "inet gpuyard_lab_slow_link"
    rules = (
        f"table {table} {{ chain in {{ type nat hook prerouting priority dstnat; policy accept; "
        f'iifname "host0" fib daddr type local tcp dport {{ {injection["ports"]} }} redirect to :{LINK_PORT}; }}; }}'
    )
    words = [LINK_PORT, injection.whole("delay_ms"), injection.number("loss"), injection.number("cut"), injection.seed]
    start = helper(
        injection,
        f'python3 "$keep/slow_link.py" {" ".join(map(str, words))}',
        f"ss -Hltn sport = :{LINK_PORT} | grep -q .",
    )
    return (
        OnNode(f"cat >\"$keep/slow_link.py\" <<'PROGRAM'\n{program}PROGRAM"),
        start,
        OnNode(f"nft -f - <<'RULES'\n{rules}\nRULES", f"nft delete table {table} 2>/dev/null || true"),
    )


def rate(injection: Injection) -> tuple[Step, ...]:
    kbit = injection.whole("kbit")
    # What leaves the node is held up at its own end of the cable, what reaches it at the other.
    return (
        Rate(kbit),
        OnNode(
            f"tc qdisc replace dev host0 root tbf rate {kbit}kbit burst 32kb latency 400ms",
            "! tc qdisc show dev host0 root | grep -q ' tbf ' && true || tc qdisc del dev host0 root",
        ),
    )


def full(injection: Injection) -> tuple[Step, ...]:
    """A small file system of its own in the folder's place, with all that was in it; what changes there is kept."""
    path, free = injection.quoted("path"), injection.whole("free_kib")
    do = f"""\
path={path} stage=/run/gpuyard-lab/disk-full
[ -d "$path" ] || {{ mkdir -p "$path" && touch "$keep/made"; }}
if [ ! -e "$keep/copied" ]; then
  mkdir -p $stage
  mount -t tmpfs -o mode=755,size=2G tmpfs $stage
  mount --make-private $stage
  # What is large stays where it is, and is seen through the full disk.
  du -xm --max-depth=3 "$path" | awk -v top="$path" '$1 > 100 && $2 != top {{print substr($2, length(top) + 2)}}' |
    sort | awk 'last == "" || index($0 "/", last "/") != 1 {{print; last = $0}}' >"$keep/large"
  sed 's#^#./#' "$keep/large" | tar -C "$path" --one-file-system --anchored -X - -cf - . | tar -C $stage -xpf -
  while read -r large; do
    mkdir -p "$stage/$large"
    mount --bind "$path/$large" "$stage/$large"
  done <"$keep/large"
  (cd $stage && find . -xdev | sort) >"$keep/before"
  touch "$keep/copied"
  mount -o remount,size=$(($(df --output=used -k $stage | tail -n1) + {free} + 8))k $stage
  avail=$(df --output=avail -k $stage | tail -n1)
  [ $avail -le {free} ] || head -c $(((avail - {free}) * 1024)) /dev/zero >$stage/.gpuyard-lab-filler
  mount --rbind $stage "$path"
  umount --recursive $stage
  rmdir $stage
fi"""
    undo = f"""\
path={path} stage=/run/gpuyard-lab/disk-full
if [ -e "$keep/copied" ] && [ -e "$path/.gpuyard-lab-filler" ]; then
  mkdir -p $stage
  mount --bind "$path" $stage
  mount --make-private $stage
  umount --lazy "$path"
  rm -f $stage/.gpuyard-lab-filler
  (cd $stage && find . -xdev | sort) >"$keep/after"
  comm -23 "$keep/before" "$keep/after" | while read -r gone; do
    rm -rf "$path/$gone"
  done
  (cd $stage && find . -xdev -newer "$keep/copied" ! -type d -print0 | xargs -0r cp -a --parents -t "$path")
fi
while mountpoint -q $stage; do
  umount --recursive --lazy $stage
done
[ ! -d $stage ] || rmdir $stage
[ ! -e "$keep/made" ] || rmdir "$path\""""
    return (OnNode(do, undo),)


def read_only(injection: Injection) -> tuple[Step, ...]:
    path = injection.quoted("path")
    line = "EXT4-fs (nvme0n1): Remounting filesystem read-only"
    return (
        OnNode(
            f'path={path}\n[ -d "$path" ] || {{ mkdir -p "$path" && touch "$keep/made"; }}\n'
            f'touch "$keep/bound"\nmount -o bind,ro "$path" "$path"',
            f'path={path}\nif [ -e "$keep/bound" ] && findmnt -no OPTIONS -M "$path" | tail -n1 | grep -q "^ro"; then\n'
            f'  umount --lazy "$path"\nfi\n[ ! -e "$keep/made" ] || rmdir "$path"',
        ),
        kernel("EXT4-fs error (device nvme0n1): ext4_journal_check_start:83: Detected aborted journal", line),
    )


FAULTS = (
    Fault(
        "partition",
        "the network between the node and others passes nothing, in one direction or both",
        "Jepsen's nemesis; GKE node auto-repair (silent for ten minutes)",
        ("F38",),
        cut,
        no_way,
        (
            Parameter(
                "direction", "in: nothing reaches the node; out: nothing leaves it", "both", among=("both", "in", "out")
            ),
            Parameter("peer", "all, host (this machine), or one node", "all", like=r"[a-z0-9-]+"),
        ),
    ),
    Fault(
        "slow-link",
        "connections to the node are delayed, lose segments (each waits for TCP's retransmission) or break",
        "RFC 6298 (retransmission timeout), Linux TCP_RTO_MIN 200 ms",
        ("F32", "F38"),
        slow_link,
        lambda _: Probe("nft list table inet gpuyard_lab_slow_link 2>/dev/null | grep -q redirect"),
        (
            Parameter("ports", "to which ports of the node, as nft writes them", "1024-65535", like=r"[0-9, -]+"),
            Parameter("delay_ms", "of what passes, each way", "100", between=(0, 60_000)),
            Parameter("loss", "share of segments that are lost once", "0", between=(0.0, 1.0)),
            Parameter("cut", "share of connections that break in the middle", "0", between=(0.0, 1.0)),
        ),
    ),
    Fault(
        "rate-limit",
        "the node's cable carries no more than so much (token bucket)",
        "tc-tbf(8)",
        ("F32", "F38"),
        rate,
        lambda _: Probe("tc qdisc show dev host0 root | grep -q ' tbf '"),
        (Parameter("kbit", "kilobits in a second, each way", "1000", between=(8, 10_000_000)),),
    ),
    Fault(
        "link-flaps",
        "the link goes down and up again, several times",
        "Azure/azurehpc-health-checks (5 flaps in 24 h); leptonai/gpud (flaps are sticky)",
        ("F32",),
        lambda injection: (Flaps(injection.whole("times"), injection.number("down_seconds")),),
        lambda _: Probe(
            '[ -e "$keep/since" ] && journalctl -u systemd-networkd -q --no-pager --since "@$(cat "$keep/since")" '
            '| grep -q "host0: Lost carrier"'
        ),
        (
            Parameter("times", "how often", "5", between=(1, 50)),
            Parameter("down_seconds", "how long it is down", "0.3", between=(0.05, 60.0)),
        ),
    ),
    Fault(
        "power-cut",
        "the node loses its power; mending gives it back, and the node boots on its disk",
        "Llama 3 (arXiv 2407.21783), host faults",
        ("F36",),
        lambda _: (Dark(),),
        lambda _: Probe("! answers", "host"),
    ),
    Fault(
        "disk-full",
        "no space left on the disk of a folder",
        "GKE node auto-repair (boot disk full for thirty minutes)",
        ("F21",),
        full,
        lambda injection: Probe(
            f"[ -d {injection.quoted('path')} ] && df --output=avail -k {injection.quoted('path')} | tail -n1 | "
            f"awk '{{exit $1 > {injection['free_kib']}}}' && ! head -c "
            f"{1024 * (injection.whole('free_kib') + 1024)} /dev/zero 2>/dev/null "
            f">{injection.quoted('path')}/.gpuyard-lab-probe; gone=$?; "
            f"rm -f {injection.quoted('path')}/.gpuyard-lab-probe; exit $gone"
        ),
        (
            Parameter(
                "path", "the folder", "/var", among=("/var", "/var/cache", "/var/lib/models", "/boot", "/opt", "/home")
            ),
            Parameter("free_kib", "KiB that are left", "0", between=(0, 1_000_000)),
        ),
    ),
    Fault(
        "read-only",
        "the file system of a folder was remounted read-only after an error",
        "ext4(5), errors=remount-ro",
        ("F21",),
        read_only,
        lambda injection: Probe(
            f"[ -d {injection.quoted('path')} ] && ! touch {injection.quoted('path')}/.gpuyard-lab-probe 2>/dev/null; "
            f"gone=$?; rm -f {injection.quoted('path')}/.gpuyard-lab-probe 2>/dev/null; exit $gone"
        ),
        (
            Parameter(
                "path",
                "the folder",
                "/var/lib/models",
                among=("/var/lib/models", "/var/cache", "/opt", "/home", "/etc"),
            ),
        ),
    ),
    # --- the machine from which the fleet is run ----------------------------------------------------------
    Fault(
        "program-killed",
        "the program that changes the fleet is killed (SIGKILL), once, wherever it is",
        "pulumi/pulumi#4265, #8435, #5377; NVIDIA/gpu-operator#2509",
        ("F37", "F46"),
        lambda injection: (Killed(injection["program"]),),
        lambda injection: Probe(f"[ -e $project/.gpuyard/labs/$stack/faults/killed-{injection['program']} ]", "host"),
        (Parameter("program", "which", "ansible-playbook", among=("ansible-playbook", "pulumi")),),
        target=CONTROLLER,
    ),
    Fault(
        "pulumi-state-truncated",
        "Pulumi's state of this stack ends in the middle",
        "pulumi/pulumi#4265, #8435",
        ("F46",),
        lambda injection: (Truncated(".gpuyard/pulumi/.pulumi/stacks/gpuyard/{stack}.json", injection.seed),),
        lambda _: Probe(
            "! python3 -m json.tool $project/.gpuyard/pulumi/.pulumi/stacks/gpuyard/$stack.json >/dev/null 2>&1", "host"
        ),
        target=CONTROLLER,
    ),
)
