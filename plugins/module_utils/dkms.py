"""Modules that DKMS builds for a driver, kept on the node until the driver's package asks DKMS for them.

A package's script adds its source to DKMS, builds what is not built, and installs that. Between the first two DKMS runs
the hook POST_ADD, and here the hook puts there what was built before: `override` names the hook for one version of one
source (/etc/dkms, see "DKMS.CONF OVERRIDES" in dkms(8)), `RESTORE` is it. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MARK = "# Written by gpuyard"
OVERRIDES = "/etc/dkms"
TREE = "/var/lib/dkms"
LATE = (124, 137)
"""Exit codes of `timeout` where it ended what it ran."""

# Runs as `dkms add` ends, in the folder of the source. What it cannot do is left to DKMS, which then compiles.
# $1: the kept tree; then name and version of the source; then the source's own hook, if it has one.
RESTORE = """\
#!/bin/bash
kept=$1 name=$2 version=$3
shift 3
dkms_tree=/var/lib/dkms
[ ! -r /etc/dkms/framework.conf ] || . /etc/dkms/framework.conf
for built in "$kept/$name/$version"/*/*/; do
  built=${built%/} place=$dkms_tree/$name/$version/${built#"$kept/$name/$version/"}
  if [ -d "$dkms_tree/$name/$version" ] && [ ! -e "$place" ] && (cd "$built" && sha256sum --check --status SHA256SUMS)
  then
    mkdir -p "${place%/*}" && cp -a "$built" "$place.half" &&
      rm "$place.half/SHA256SUMS" && mv "$place.half" "$place" || rm -rf "$place" "$place.half"
  fi
done
[ $# -eq 0 ] || exec ./"$@"
"""


def named(conf: str) -> tuple[str, str] | None:
    """Name and version of a source, as its dkms.conf says; None where it says neither in plain words."""
    found = dict(
        re.findall(r'^\s*(PACKAGE_NAME|PACKAGE_VERSION)=["\']?([A-Za-z0-9.+~_-]+)["\']?\s*(?:#.*)?$', conf, re.M)
    )
    return (found["PACKAGE_NAME"], found["PACKAGE_VERSION"]) if len(found) == 2 else None


def sources(listing: str) -> list[str]:
    """The dkms.conf of each source in a package, by the paths of `dpkg-deb --fsys-tarfile | tar -t`."""
    return sorted(line for line in listing.splitlines() if re.fullmatch(r"(\./)?usr/src/[^/]+/dkms\.conf", line))


class RefusedError(Exception):
    """What was found, why it is refused, the smallest change that would pass."""


def aside(seconds: int) -> list[str]:
    """Words before a build: what serves on this node meanwhile comes first, and it ends (see `LATE`)."""
    return ["nice", "-n", "19", "ionice", "-c", "3", "timeout", "--kill-after=10", str(seconds)]


def last_words(text: str) -> str:
    """The compiler's, or DKMS's own."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower()]
    return "; ".join((wrong or lines)[-3:])[:600]


def numbers(release: str) -> list[Any]:
    """A kernel's release, to be compared: numbers as numbers, and before words."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"[0-9]+|[a-z]+", release)]


def kernels(running: str, bootable: Iterable[str], headers: Iterable[str]) -> list[str]:
    """The kernels that a package's script builds for: the running one, and the newest that would be booted.

    As /usr/lib/dkms/common.postinst chooses them. For one without headers nothing is built, there or here.
    """
    there = sorted(bootable, key=numbers)
    newest = [there[-1]] if there and numbers(there[-1]) > numbers(running) else []
    return [kernel for kernel in (running, *newest) if kernel in set(headers)]


def current(stamp: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether what was built is what would be built now: of this source, for these headers, with this key."""
    return stamp is not None and dict(stamp) == dict(now)


def override(tree: str, script: str, name: str, version: str) -> str:
    """What /etc/dkms/NAME-VERSION.conf says. A hook is named by its path from the folder of the source."""
    return (
        f"{MARK}: modules that were built before this driver is installed are put where DKMS looks for them.\n"
        f'POST_ADD="../../..{script} {tree} {name} {version} ${{POST_ADD:-}}"\n'
    )


def refused(node: str, version: str, kernel: str, why: str) -> str:
    return (
        f"DRIVER-BUILD: the modules of driver {version} are to be built for kernel {kernel} on {node}, before it is "
        f"emptied, and are not: {why}. Lock a driver that builds for this kernel, or boot a kernel that it builds for"
    )
