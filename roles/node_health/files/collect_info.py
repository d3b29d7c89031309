"""Write a bundle of evidence about this node, with secrets taken out. Changes nothing but the bundle.

Arguments: the bundle to write, and a JSON object with `units`, `packages`, `files` and `secret_files`, each a list of
shell patterns. Needs Python 3.9 or later and its standard library.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

DEADLINE_SECONDS = 60
# The end of a long text is what matters; a log that fills a disk must not fill another one.
KEPT_BYTES = 4 * 1024 * 1024
JOURNAL_LINES = "5000"
REMOVED = "[removed]"

# Shapes that are secrets wherever they stand, in addition to what the secret files of this node hold. What stands in
# front of a secret (group 1) stays, so that the line can still be understood.
SHAPES = (
    re.compile(
        r"()-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----", re.DOTALL
    ),
    re.compile(r"(bearer[\\\s]+)[^\s\"']+", re.IGNORECASE),
    re.compile(r"(authorization:\s*basic\s+)[^\s\"']+", re.IGNORECASE),
    re.compile(r"()\bhf_[A-Za-z0-9]{16,}\b"),
    re.compile(
        r"((?:api[_-]?keys?|secret|token|password|passphrase)(?:[\"']?\s*[=:]\s*|\s+(?=\S{16}))[\"']?)[^\s\"']+",
        re.IGNORECASE,
    ),
)


def commands(units: Sequence[str], packages: Sequence[str]) -> dict[str, list[str]]:
    """File in the bundle, and the command whose output it holds."""
    named = [word for unit in units for word in ("--unit", unit)]
    return {
        "system/uname.txt": ["uname", "-a"],
        "system/uptime.txt": ["uptime"],
        "system/disks.txt": ["df", "--human-readable"],
        "system/memory.txt": ["free", "--mebi"],
        "system/processes.txt": ["ps", "-eo", "pid,ppid,user,stat,etime,rss,args", "--forest"],
        "system/addresses.txt": ["ip", "-brief", "address"],
        "system/pci.txt": ["lspci", "-nn"],
        "system/modules.txt": ["lsmod"],
        "units/failed.txt": ["systemctl", "list-units", "--failed", "--no-pager"],
        "units/status.txt": ["systemctl", "status", "--no-pager", "--full", "--lines=30", *units],
        "units/timers.txt": ["systemctl", "list-timers", "--all", "--no-pager"],
        "journal/units.txt": ["journalctl", "--no-pager", "--output=short-iso", "--lines", JOURNAL_LINES, *named],
        "journal/kernel.txt": ["journalctl", "--no-pager", "--output=short-iso", "--lines", JOURNAL_LINES, "--dmesg"],
        "packages/installed.txt": ["dpkg-query", "--list", *packages],
        "packages/holds.txt": ["apt-mark", "showhold"],
        "packages/audit.txt": ["dpkg", "--audit"],
        "packages/policy.txt": ["apt-cache", "policy", *matching_packages(packages)],
        "driver/nvidia-smi.txt": ["nvidia-smi"],
        "driver/nvidia-smi-q.txt": ["nvidia-smi", "-q"],
    }


def matching_packages(patterns: Sequence[str]) -> list[str]:
    done = ask(["dpkg-query", "--show", "--showformat=${Package}\n", *patterns])
    return sorted(line for line in done.splitlines() if re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", line))


def ask(command: Sequence[str]) -> str:
    """What a command says, or why it says nothing: a missing tool is evidence too."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_SECONDS,
            env={**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as wrong:
        return f"no answer: {wrong}\n"
    text = done.stdout[-KEPT_BYTES:].decode(errors="replace")
    return text if done.returncode == 0 else f"{text}\n(exit status {done.returncode})\n"


def read(path: str) -> str:
    try:
        return Path(path).read_bytes()[-KEPT_BYTES:].decode(errors="replace")
    except OSError as wrong:
        return f"not readable: {wrong.strerror}\n"


def expand(patterns: Iterable[str]) -> list[str]:
    return sorted({path for pattern in patterns for path in glob.glob(pattern) if Path(path).is_file()})  # noqa: PTH207 patterns are absolute


def secrets(texts: Iterable[str]) -> list[str]:
    """Every word of the secret files that is long enough to be a secret, the longest first."""
    words = {word for text in texts for word in re.split(r"[\s\"'=:,;]+", text) if len(word) >= 12}
    return sorted(words, key=len, reverse=True)


def redact(text: str, known: Sequence[str]) -> str:
    for secret in known:
        text = text.replace(secret, REMOVED)
    for shape in SHAPES:
        text = shape.sub(lambda match: match.group(1) + REMOVED, text)
    return text


def main(arguments: Sequence[str]) -> None:
    bundle, wanted = arguments[0], json.loads(arguments[1])
    hidden = expand(wanted["secret_files"])
    known = secrets(read(path) for path in hidden)
    texts = {name: ask(command) for name, command in commands(wanted["units"], wanted["packages"]).items()}
    for path in expand(wanted["files"]):
        texts["files" + path] = f"{REMOVED}\n" if path in hidden else read(path)
    # The bundle holds logs of users' requests; it is nobody else's to read.
    descriptor = os.open(bundle, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, text in sorted(texts.items()):
            data = redact(text, known).encode()
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
            tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main(sys.argv[1:])
