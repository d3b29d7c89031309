"""Shell text that faults on a node are made of."""

from __future__ import annotations

import json
import shlex
from typing import Any

from gpuyard.lab.faults.model import Injection, OnNode

APPLY = "/usr/local/lib/gpuyard-lab/simulated_gpu.py apply"
PATCHES = "/var/lib/gpuyard-lab/faults.d"

# One breaks or mends at a time, also where the login of a killed one still works on. `set -e`: half a fault is none.
_HEAD = """\
set -eu
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
keep=/usr/local/lib/gpuyard-lab/faults/{fault}
exec 9>/run/lock/gpuyard-lab-faults
flock -w 120 9
"""
_TAIL = """\
rm -rf "$keep"
cd /usr/local/lib && rmdir --parents --ignore-fail-on-non-empty gpuyard-lab/faults 2>/dev/null || true
"""


def breaking(fault: str, steps: list[OnNode]) -> str:
    marks = 'mkdir -p "$keep"\n[ -e "$keep/since" ] || date +%s.%N >"$keep/since"\n'
    return _HEAD.format(fault=fault) + marks + "\n".join(step.do for step in steps) + "\n"


def mending(fault: str, steps: list[OnNode]) -> str:
    """Also of a fault that was broken half: each step finds out by itself what there is to mend."""
    return _HEAD.format(fault=fault) + "\n".join(step.undo for step in reversed(steps)) + "\n" + _TAIL


def asking(injection: Injection, question: str) -> str:
    keep = f"keep=/usr/local/lib/gpuyard-lab/faults/{injection.fault}"
    return f"export LC_ALL=C\n{keep} gpu={injection.gpu}\n{question}\n"


# --- the kernel's log ------------------------------------------------------------------------------------

# As the kernel writes into /dev/kmsg: the journal daemon reads the record itself and marks it `_TRANSPORT=kernel`.
# A pipe in packet mode gives one record per read, as the device does. The daemon drops numbers that it has seen.
_KERNEL = """\
python3 - {lines} <<'PYTHON'
import fcntl, os, struct, sys, time
def next_number():
    with open("/run/systemd/journal/kernel-seqnum", "rb") as file:
        return struct.unpack("<Q", file.read(8))[0]
pipe = os.open("/run/gpuyard-lab/kmsg", os.O_WRONLY | os.O_NONBLOCK)
fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_NONBLOCK | os.O_DIRECT)
number = next_number()
deadline = time.monotonic() + 10
def wait():
    if time.monotonic() > deadline:
        sys.exit("the journal daemon does not read the kernel's lines")
    time.sleep(0.02)
for line in sys.argv[1:]:
    record = ("3,%d,%d,-;%s\\n" % (number, time.monotonic_ns() // 1000, line)).encode()
    number += 1
    while True:
        try:
            os.write(pipe, record)
            break
        except BlockingIOError:  # it holds sixteen
            wait()
while next_number() < number:
    wait()
PYTHON"""


def kernel(*lines: str) -> OnNode:
    """Lines of the kernel in the node's journal. What was logged stays logged."""
    return OnNode(_KERNEL.format(lines=" ".join(shlex.quote(line) for line in lines)))


def logged(pattern: str) -> str:
    """Whether the kernel has said so since the fault began."""
    since = '--since "@$(cat "$keep/since")"'
    return f'[ -e "$keep/since" ] && journalctl -k -q --no-pager -o cat {since} | grep -q {shlex.quote(pattern)}'


# --- GPUs and engines ------------------------------------------------------------------------------------


def gpu_state(injection: Injection, patch: dict[str, Any]) -> OnNode:
    """A patch over the simulated hardware, in a file of its own."""
    file = f"{PATCHES}/{injection.fault}.json"
    text = shlex.quote(json.dumps({"patch": patch}, sort_keys=True))
    return OnNode(
        f"mkdir -p {PATCHES}\nprintf '%s\\n' {text} >{file}.new\nmv {file}.new {file}\n{APPLY}",
        f"rm -f {file} {file}.new\n[ ! -d {PATCHES} ] || rmdir --ignore-fail-on-non-empty {PATCHES}\n"
        f"[ ! -x {APPLY.split()[0]} ] || {APPLY}",
    )


# All faults of the engine share its one file: each keeps its piece, and the file is all pieces laid together.
_ENGINE = """\
python3 - <<'PYTHON'
import glob, json, os
file = "/var/lib/gpuyard-lab/engine.json"
told = {}
for piece in sorted(glob.glob("/usr/local/lib/gpuyard-lab/faults/*/engine.json")):
    with open(piece) as text:
        told.update(json.load(text))
if told:
    with open(file + ".new", "w") as new:
        json.dump(told, new)
    os.chmod(file + ".new", 0o644)
    os.replace(file + ".new", file)
elif os.path.exists(file):
    os.unlink(file)
PYTHON"""


def engine(injection: Injection, told: dict[str, Any]) -> OnNode:
    text = shlex.quote(json.dumps({"seed": injection.seed, **told}, sort_keys=True))
    return OnNode(f"printf '%s\\n' {text} >\"$keep/engine.json\"\n{_ENGINE}", f'rm -f "$keep/engine.json"\n{_ENGINE}')


# --- services and helpers --------------------------------------------------------------------------------


def helper(injection: Injection, command: str, ready: str) -> OnNode:
    """A process that lasts as long as the fault, in a unit of its own; broken once `ready` is true."""
    unit = f"gpuyard-lab-{injection.fault}.service"
    stop = f"systemctl stop {unit} 2>/dev/null || true\nsystemctl reset-failed {unit} 2>/dev/null || true"
    wait = (
        f"n=0\nuntil {ready}; do\n  n=$((n + 1))\n"
        f'  [ $n -lt 100 ] || {{ echo "{unit} does not come up" >&2; exit 1; }}\n  sleep 0.1\ndone'
    )
    return OnNode(f"{stop}\nsystemd-run --quiet --collect --unit={unit} {command}\n{wait}", stop)


# Whoever changes a driver has stopped its daemons and starts them again: begun in between, they hold what he unloads.
IN_HAND = """grep -Eqs '"state": "(drain|driver-install|validation|uncordon|rollback)-required"' \
  /var/lib/gpuyard/driver-upgrade.json"""

# What a driver that is not loaded after a boot looks like: its daemons and the engines that need it are down too.
UNLOADED = OnNode(
    """\
if [ ! -e "$keep/active" ]; then
  lsmod | awk '/^nvidia/ {print $1}' >"$keep/modules"
  systemctl list-units --plain --no-legend --state=active,activating nvidia-persistenced.service \\
    nvidia-fabricmanager.service 'vllm@*.service' | awk '{print $1}' >"$keep/active.new"
  mv "$keep/active.new" "$keep/active"
fi
xargs -r systemctl stop <"$keep/active"
for module in nvidia_peermem nvidia_drm nvidia_modeset nvidia_uvm nvidia; do
  if lsmod | grep -q "^$module "; then rmmod $module; fi
done""",
    f"""\
if [ -e "$keep/active" ] && ! {IN_HAND}; then
  xargs -r modprobe -a <"$keep/modules"
  xargs -r systemctl reset-failed <"$keep/active" 2>/dev/null || true
  xargs -r systemctl start <"$keep/active"
fi""",
)


def packages_kept(names: str) -> OnNode:
    """Remember version, hold and mark of packages; mending brings them back to it. `names` is shell text of a list."""
    return OnNode(
        f"""\
if [ ! -e "$keep/packages" ]; then
  apt-mark showhold >"$keep/held"
  apt-mark showauto >"$keep/auto"
  dpkg-query -W -f '${{Package}}=${{Version}}\\n' $({names}) >"$keep/packages.new"
  mv "$keep/packages.new" "$keep/packages"
fi""",
        """\
if [ -e "$keep/packages" ]; then
  dpkg --configure -a || true
  xargs apt-get install -qq -y --allow-downgrades --allow-change-held-packages --no-install-recommends \\
    -o DPkg::Lock::Timeout=60 <"$keep/packages" >"$keep/log" 2>&1 || { cat "$keep/log" >&2; exit 1; }
  sed s/=.*// "$keep/packages" | grep -Fxf "$keep/held" | xargs -r apt-mark hold >/dev/null
  sed s/=.*// "$keep/packages" | grep -Fxf "$keep/auto" | xargs -r apt-mark auto >/dev/null || true
fi""",
    )
