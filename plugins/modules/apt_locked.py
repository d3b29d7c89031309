#!/usr/bin/python
"""Exactly these versions of these packages, in one transaction, held."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.dpkg import GONE, QUERY, parse_broken

DOCUMENTATION = r"""
module: apt_locked
short_description: Install exactly the locked versions of packages, in one transaction, and hold them
description:
  - Looks the versions up, rehearses the transaction, and refuses before it changes anything when a version is unknown,
    when another package would have to go, or when a version would go back without consent.
  - Ends a transaction that was interrupted (C(dpkg --configure -a)) before it starts its own.
  - Sets the hold again after each change, since a change of a held package clears it.
  - Keeps the files of a set in a folder, each verified against the hash in apt's signed index, and installs from there
    without a download, so that neither the way there nor the way back needs the repository.
options:
  packages:
    description: Package names with the exact version of each.
    type: dict
    required: true
  state:
    description:
      - C(present) installs and holds; C(absent) purges what is there of these packages, whatever its version.
      - C(fetched) only brings the files to C(kept), and those of packages that would come along, so that a later
        transaction downloads nothing. It reads the index again; where that fails, files that were verified before do.
    type: str
    choices: [present, absent, fetched]
    default: present
  replaces:
    description:
      - Packages (shell patterns) that go in exchange, in the same transaction. Any other removal is refused.
    type: list
    elements: str
    default: []
  kept:
    description:
      - Folder of this set of packages, with their hashes in C(SHA256SUMS). What is missing there is fetched before
        anything is installed, and the transaction downloads nothing. Without it apt downloads into its own archives.
    type: path
  allow_downgrade:
    description: Consent to go back to an older version.
    type: bool
    default: false
  sources_file:
    description: Sources file of the repository, whose index is read again when a version is not known.
    type: path
  refresh:
    description: Read the index again in any case, for a repository or a key that is new.
    type: bool
    default: false
  expect_known:
    description:
      - Whether a version that is not known is refused. Before the repository is on the node a check run cannot know;
        it then says so and rehearses nothing.
    type: bool
    default: true
  seconds:
    description:
      - How long a transaction may take, with the scripts of its packages, one of which may wait for something that
        never comes. Then it is ended with all that it started, and what it left half done is for the next one.
    type: int
    default: 1200
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Rehearses the transaction with apt and reports what it would change.}
  diff_mode: {support: full, description: Shows version and hold of each package before and after.}
"""

EXAMPLES = r"""
- name: Put the locked driver on the node
  gpuyard.fleet.apt_locked:
    packages: {nvidia-driver-cuda: 580.126.20-1, libnvidia-ml1: 580.126.20-1}
"""

RETURN = r"""
fetched:
  description: Package=version of what was, or would be, brought to the node.
  returned: when state is fetched
  type: list
  elements: str
installed:
  description: Package=version of what was, or would be, installed.
  returned: success
  type: list
  elements: str
removed:
  description: Packages that were, or would be, removed.
  returned: success
  type: list
  elements: str
held:
  description: Packages whose hold was, or would be, set.
  returned: success
  type: list
  elements: str
ended_interrupted:
  description: Whether an interrupted transaction of dpkg was ended first.
  returned: success
  type: bool
index_read:
  description: Whether the index was read again where that was asked for; not where kept files had to do.
  returned: success
  type: bool
looked_up:
  description: Whether the versions were looked up; a check run before the repository is there cannot.
  returned: success
  type: bool
"""

SUMS = "SHA256SUMS"
NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
VERSION = re.compile(r"(?:[0-9]+:)?[0-9][A-Za-z0-9.+~-]*")

APT_GET = (
    "apt-get",
    "--yes",
    "--no-install-recommends",
    # Another apt run (a timer, a person) may hold the lock for a while: wait for it, but not for ever.
    "--option=DPkg::Lock::Timeout=300",
    # A question about a changed configuration file would wait for an answer nobody gives.
    "--option=Dpkg::Options::=--force-confdef",
    "--option=Dpkg::Options::=--force-confold",
    # On a terminal of its own dpkg is in another session than apt, so it and its lock outlive an apt that is ended.
    "--option=Dpkg::Use-Pty=0",
)

TIMED_OUT = (124, 137)
"""Exit codes of timeout(1): ended when the time was up; killed, as it did not end."""

ENVIRONMENT = {
    "LC_ALL": "C",
    "DEBIAN_FRONTEND": "noninteractive",
    # On Ubuntu needrestart would restart services (an engine that answers) behind our back.
    "NEEDRESTART_SUSPEND": "1",
}


class Have(NamedTuple):
    """One installed package."""

    version: str
    held: bool


class RefusedError(Exception):
    """What was found, why it is refused, the smallest change that would pass."""


def malformed(packages: dict[str, str]) -> list[str]:
    """The entries that are not a package name with an exact version."""
    wrong = []
    for name, version in packages.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            wrong.append(f"{name!r} is not a package name")
        elif not isinstance(version, str) or not VERSION.fullmatch(version):
            wrong.append(f"{name}: {version!r} is not an exact version")
    return wrong


def parse_installed(text: str, architecture: str) -> dict[str, Have]:
    """Installed packages in dpkg-query's words; half-installed ones count, leftover configuration does not."""
    installed = {}
    for line in text.splitlines():
        name, arch, version, want, status = line.split("\t")
        if arch in (architecture, "all") and status not in GONE:
            # Killed while it was unpacked, a package has some of its files: no version can be said to be there.
            installed[name] = Have("" if status == "half-installed" else version, want == "hold")
    return installed


def parse_known(text: str) -> dict[str, list[str]]:
    """Versions that `apt-cache madison` lists for each package, in its order: newest first."""
    known: dict[str, list[str]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        # Sources are listed as well; they cannot be installed.
        if len(fields) == 3 and not fields[2].endswith("Sources"):
            versions = known.setdefault(fields[0], [])
            if fields[1] not in versions:
                versions.append(fields[1])
    return known


def parse_hashes(text: str) -> dict[str, set[str]]:
    """SHA-256 of each package's file, as the stanzas of `apt-cache show` say; those of what is installed have none."""
    hashes: dict[str, set[str]] = {}
    for stanza in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[A-Za-z0-9-]+: ", line))
        if "SHA256" in fields:
            hashes.setdefault(fields["Package"], set()).add(fields["SHA256"])
    return hashes


def parse_arrivals(simulation: str) -> dict[str, str]:
    """Packages that a simulated transaction would install, with the version of each."""
    found = re.findall(r"^Inst ([^\s:]+)\S*(?: \[\S*\])? \((\S+)", simulation, re.MULTILINE)
    return dict(found)


def parse_removals(simulation: str) -> list[str]:
    """Packages that a simulated transaction would remove."""
    return sorted({line.split()[1] for line in simulation.splitlines() if line.startswith(("Remv ", "Purg "))})


def unknown(packages: dict[str, str], installed: dict[str, Have], known: dict[str, list[str]]) -> list[str]:
    """A sentence for each wanted version that is neither installed nor in any repository."""
    sentences = []
    for name, version in sorted(packages.items()):
        there = name in installed and installed[name].version == version
        if not there and version not in known.get(name, []):
            offers = ", ".join(known.get(name, [])) or "no version of it"
            sentences.append(f"{name}={version} (the repositories have {offers})")
    return sentences


def wanted_state(packages: dict[str, str], installed: dict[str, Have]) -> tuple[list[str], list[str]]:
    """What has to be installed, and what has to be held (a change of a held package clears its hold)."""
    install = [name for name in sorted(packages) if name not in installed or installed[name].version != packages[name]]
    hold = [name for name in sorted(packages) if name in install or not installed[name].held]
    return install, hold


def describe(names: Sequence[str], state: dict[str, Have]) -> str:
    """The state of packages as lines, for the diff."""
    lines = []
    for name in sorted(names):
        have = state.get(name)
        words = "absent" if have is None else have.version + (" held" if have.held else "")
        lines.append(f"{name} {words}\n")
    return "".join(lines)


class Kept:
    """A folder with the files of one set, and the hash that each had when it was verified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sums: dict[str, str] = {}
        if (folder / SUMS).is_file():
            lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
            self._sums = {name: digest for digest, name in lines}
        self._found: dict[Path, str] = {}

    def file(self, name: str, version: str, offered: Sequence[str] = ()) -> Optional[Path]:
        """The file of a package, where it is still the one that was verified, and one that the index offers.

        An index that does not have the version any more offers nothing, and takes nothing away.
        """
        for path in sorted(self.folder.glob(f"{name}_{version.replace(':', '%3a')}_*.deb")):
            known = self._sums.get(path.name)
            if known and self._digest(path) == known and (not offered or known in offered):
                return path
        return None

    def holds(self, packages: dict[str, str]) -> bool:
        return all(self.file(name, version) for name, version in packages.items())

    def word(self, name: str, version: str) -> str:
        """How apt is asked for it: by its file, which needs no index, or by its version."""
        return str(self.file(name, version) or f"{name}={version}")

    def take(self, path: Path, offered: Sequence[str]) -> None:
        """Keeps a file that was fetched. Raises RefusedError for one that the index does not offer."""
        digest, into = self._digest(path), self.folder / path.name
        if digest not in offered:
            raise RefusedError(
                f"APT-HASH: {path.name} is not the file that the signed index names. Nothing was changed. Mend the "
                "repository, then run again."
            )
        path.replace(into)
        self._found[into] = self._sums[into.name] = digest
        half = self.folder / f".{SUMS}"
        half.write_text("".join(f"{sum_}  {name}\n" for name, sum_ in sorted(self._sums.items())))
        half.replace(self.folder / SUMS)

    def _digest(self, path: Path) -> str:
        if path not in self._found:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            self._found[path] = digest.hexdigest()
        return self._found[path]


class Node:
    """The node's package manager. Each command is a list of words; nothing passes a shell."""

    def __init__(self, run: Callable[..., tuple[int, str, str]], seconds: int) -> None:
        self._run = run
        self._seconds = seconds
        self._index: list[str] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is read of the index meanwhile lies in a folder of its own, and is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="gpuyard-apt-") as folder:
            (Path(folder) / "partial").mkdir()
            self._index = [f"--option=Dir::State::lists={folder}", "--option=APT::Sandbox::User=root"]
            self._index += ["--option=Dir::Cache::pkgcache=", "--option=Dir::Cache::srcpkgcache="]
            try:
                yield
            finally:
                self._index = []

    def _ask(self, *command: str) -> str:
        code, out, err = self._run(list(command), environ_update=ENVIRONMENT)
        if code != 0:
            raise RefusedError("APT-BROKEN: {} failed ({}): {}".format(" ".join(command[:2]), code, tail(err or out)))
        return out

    def installed(self, names: Sequence[str]) -> dict[str, Have]:
        architecture = self._ask("dpkg", "--print-architecture").strip()
        # dpkg-query exits 1 when one of the names is unknown to it, which is an answer, not a failure.
        query = ["dpkg-query", "--show", "--showformat=" + QUERY, *sorted(names)]
        return parse_installed(self._run(query, environ_update=ENVIRONMENT)[1], architecture)

    def known(self, names: Sequence[str]) -> dict[str, list[str]]:
        return parse_known(self._ask("apt-cache", *self._index, "madison", *sorted(names)))

    def hashes(self, packages: dict[str, str]) -> dict[str, set[str]]:
        """What the index says of the files of these versions; nothing of those that it does not have."""
        words = [f"{name}={version}" for name, version in sorted(packages.items())]
        # apt-cache exits 100 when it does not have one of them, and tells of the others all the same.
        return parse_hashes(self._run(["apt-cache", *self._index, "show", *words], environ_update=ENVIRONMENT)[1])

    def refresh(self, sources_file: str) -> None:
        """Reads this one repository's index. Other repositories, which may be out of reach, are left as they are."""
        command = [
            "apt-get",
            "update",
            # Without it a wrong or missing key is a warning, the old index stays, and the exit status is 0.
            "--error-on=any",
            "--option=Dir::Etc::SourceList=" + sources_file,
            "--option=Dir::Etc::SourceParts=-",
            "--option=APT::Get::List-Cleanup=0",
            "--option=DPkg::Lock::Timeout=300",
            *self._index,
        ]
        code, out, err = self._run(command, environ_update=ENVIRONMENT)
        if code != 0:
            raise RefusedError(
                f"APT-REPOSITORY: apt does not accept the repository of {sources_file}: {tail(err or out)}. Nothing "
                "was installed from it. Give the key that signs it, or an address that answers."
            )

    def _run_bounded(self, command: Sequence[str]) -> tuple[int, str, str]:
        """Runs what runs the scripts of packages; it and they are ended when their time is up."""
        bounded = ["timeout", "--kill-after=30", str(self._seconds), *command]
        return self._run(bounded, environ_update=ENVIRONMENT)

    def audit(self) -> str:
        """What dpkg finds wrong. `apt-get check` stays silent about a failed postinst."""
        return self._ask("dpkg", "--audit").strip()

    def broken(self) -> dict[str, str]:
        return parse_broken(self._ask("dpkg-query", "--show", "--showformat=" + QUERY))

    def end_interrupted(self, leave: Sequence[str] = ()) -> None:
        """Ends what was begun with packages, but with those of `leave`: their scripts may be what it hung in."""
        names = sorted(set(self.broken()) - set(leave)) if leave else ["-a"]
        if names:
            self._run_bounded(["dpkg", "--force-confdef", "--force-confold", "--configure", *names])
        # A dpkg that was killed leaves a journal, and apt refuses to work beside it. This reads it, and runs nothing.
        self._run(["dpkg", "--set-selections"], data="\n", environ_update=ENVIRONMENT)

    def older(self, version: str, than: str) -> bool:
        return self._run(["dpkg", "--compare-versions", version, "lt", than])[0] == 0

    def simulate(self, words: Sequence[str]) -> str:
        code, out, err = self._run([*APT_GET, "--simulate", *words], environ_update=ENVIRONMENT)
        if code != 0:
            raise RefusedError(
                f"APT-IMPOSSIBLE: apt finds no way to do it: {tail(out + err)}. The packages of the lock do not fit "
                "together or their repository lacks a dependency; lock a set that fits."
            )
        return out

    def apply(self, words: Sequence[str]) -> None:
        code, out, err = self._run_bounded([*APT_GET, *words])
        if code != 0:
            broken = self.audit()
            raise RefusedError(
                "APT-FAILED: the transaction {}: {}. {}".format(
                    f"did not end within {self._seconds} s, and was ended" if code in TIMED_OUT else f"failed ({code})",
                    tail(out + "\n" + err),
                    "dpkg says: " + broken if broken else "dpkg is clean; run again when the cause is mended.",
                )
            )

    def fetch(self, words: Sequence[str], into: Path) -> None:
        command = ["apt-get", "download", *words]
        code, out, err = self._run(command, environ_update=ENVIRONMENT, cwd=str(into))
        if code != 0:
            raise RefusedError(
                f"APT-FETCH: {', '.join(words)} did not come to the node: {tail(err or out)}. Nothing was changed. "
                "Mend the way to the repository, then run again."
            )

    def mark(self, mark: str, names: Sequence[str]) -> None:
        if names:
            self._ask("apt-mark", mark, *sorted(names))


def tail(text: str, lines: int = 12) -> str:
    """The end of a tool's output, which is where it says what went wrong."""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:] if line.strip())


def end_interrupted(node: Node, check: bool, packages: dict[str, str], have: dict[str, Have]) -> bool:
    """Ends a transaction that was killed; says whether there was one.

    What comes off, or to another version, goes as it stands: its scripts may have been what the transaction hung in.
    """
    if not node.audit():
        return False
    if not check:
        going = [name for name in have if have[name].version != packages.get(name)]
        node.end_interrupted([name for name in node.broken() if name in going])
    return True


def refuse_broken(node: Node, mended: Sequence[str]) -> None:
    """A package that stays broken is only bearable when the transaction that follows mends it."""
    broken = {name: status for name, status in node.broken().items() if name not in mended}
    if broken:
        raise RefusedError(
            "APT-DPKG-BROKEN: {} is not whole, and `dpkg --configure -a` did not mend it. Mend or remove it "
            "there (`dpkg --audit` says more), then run again.".format(
                ", ".join(f"{name} ({status})" for name, status in sorted(broken.items()))
            )
        )


def read_index(node: Node, sources_file: str, kept: Optional[Kept], packages: dict[str, str]) -> str:
    """Reads the index again; why that failed, where the files of all these packages are kept and it may fail."""
    try:
        node.refresh(sources_file)
    except RefusedError as error:
        if kept and packages and kept.holds(packages):
            return str(error)
        raise
    return ""


def refuse_unknown(missing: Sequence[str]) -> None:
    if missing:
        raise RefusedError(
            "APT-VERSION-UNKNOWN: not to be had on this node: {}. Lock a version that is there, or bring the "
            "locked one into the repository.".format("; ".join(missing))
        )


def without_kept(kept: Optional[Kept], packages: dict[str, str]) -> dict[str, str]:
    """Those of the packages that a repository has to have."""
    return {name: version for name, version in packages.items() if not (kept and kept.file(name, version))}


def keep(node: Node, kept: Kept, packages: dict[str, str], check: bool, renew: Sequence[str] = ()) -> list[str]:
    """Brings the files that are missing, and of `renew` those that the index names others for; name=version of each."""
    hashes = node.hashes(packages)
    offered = {name: sorted(hashes.get(name, set())) for name in packages}
    absent = {
        name: version
        for name, version in packages.items()
        if not kept.file(name, version, offered[name] if name in renew else ())
    }
    words = [f"{name}={version}" for name, version in sorted(absent.items())]
    if words and not check:
        kept.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.folder, prefix=".half-") as half:
            node.fetch(words, Path(half))
            for path in sorted(Path(half).glob("*.deb")):
                kept.take(path, offered[path.name.split("_")[0]])
    return words


def transaction(
    packages: dict[str, str], going: Sequence[str], back: bool, kept: Optional[Kept], offline: bool
) -> list[str]:
    words = ["install", "--allow-change-held-packages", *(["--allow-downgrades"] if back else [])]
    if kept and offline:
        # apt finds there what comes along.
        words += ["--no-download", f"--option=Dir::Cache::archives={kept.folder}/"]
    asked = [kept.word(name, packages[name]) if kept else f"{name}={packages[name]}" for name in sorted(packages)]
    # Named with a minus sign it goes even though it is held and pinned.
    return [*words, *asked, *(f"{name}-" for name in going)]


def comes_along(node: Node, packages: dict[str, str], simulation: str) -> dict[str, str]:
    """What a rehearsed transaction installs that nobody named. Raises RefusedError where somebody holds it."""
    others = {name: version for name, version in parse_arrivals(simulation).items() if name not in packages}
    held = sorted(name for name, have in node.installed(list(others)).items() if have.held) if others else []
    if held:
        raise RefusedError(
            "APT-HELD: installing {} would change {}, which somebody holds (`apt-mark showhold`). Agree with them and "
            "release it there (`apt-mark unhold {}`), or lock packages that live with it.".format(
                ", ".join(sorted(packages)), ", ".join(held), " ".join(held)
            )
        )
    return others


def make_present(node: Node, params: dict[str, Any], check: bool) -> dict[str, Any]:
    packages = params["packages"]
    kept = Kept(Path(params["kept"])) if params["kept"] else None
    concerned = [*packages, *params["replaces"]]
    before = node.installed(concerned)
    interrupted = end_interrupted(node, check, packages, before)
    if interrupted:
        before = node.installed(concerned)
    install, hold = wanted_state(packages, before)
    arriving = {name: packages[name] for name in install}
    going = sorted(name for name in before if name not in packages)
    if interrupted and not check:
        # A package that waits for another one of the lock is configured with it.
        refuse_broken(node, [*packages, *going] if install or going else [])
    unread = ""
    if params["refresh"] and not check:
        unread = read_index(node, params["sources_file"], kept, arriving)
    looked_up = True
    removals = going
    if install or going:
        back = [
            f"{name} {before[name].version} -> {packages[name]}"
            for name in install
            if name in before and node.older(packages[name], before[name].version)
        ]
        if back and not params["allow_downgrade"]:
            raise RefusedError(
                "APT-DOWNGRADE: {} would go back to an older version. Give consent (allow_downgrade) where that is "
                "meant, or lock the version that is installed.".format(", ".join(back))
            )
        wanted = without_kept(kept, packages)
        missing = unknown(wanted, before, node.known(list(wanted))) if wanted else []
        if missing and params["sources_file"] and not params["refresh"] and not check:
            node.refresh(params["sources_file"])
            missing = unknown(wanted, before, node.known(list(wanted)))
        if params["expect_known"]:
            refuse_unknown(missing)
        looked_up = not missing
        if kept and not check:
            keep(node, kept, arriving, check)
        words = transaction(packages, going, bool(back), kept, offline=not check)
        # An interrupted dpkg answers no simulation; a check run has left it as it found it.
        if looked_up and not (check and interrupted):
            simulation = node.simulate(words)
            removals = parse_removals(simulation)
            refused = [name for name in removals if name not in going]
            if refused:
                raise RefusedError(
                    "APT-REMOVES: installing {} would remove {}. Nothing that is not named as replaced may go; name it "
                    "(replaces), or lock packages that live beside it.".format(", ".join(install), ", ".join(refused))
                )
            along = comes_along(node, packages, simulation)
            if kept and along and not check:
                keep(node, kept, along, check)
        if not check:
            node.apply(words)
    if not check:
        node.mark("hold", hold)
        after = node.installed(list(packages))
        wrong = wanted_state(packages, after)
        if wrong != ([], []):
            raise RefusedError(
                "APT-NOT-LOCKED: after the transaction {} still differ(s) from the lock: {}".format(
                    ", ".join(sorted(set(wrong[0] + wrong[1]))), describe(list(packages), after)
                )
            )
    return {
        "changed": bool(install or hold or going or interrupted),
        "installed": [f"{name}={packages[name]}" for name in install],
        "removed": removals,
        "held": hold,
        "ended_interrupted": interrupted,
        "index_read": not unread,
        "looked_up": looked_up,
        "warnings": [unread] if unread else [],
        "diff": {
            "before": describe([*packages, *going], before),
            "after": describe([*packages, *going], {name: Have(version, True) for name, version in packages.items()}),
        },
    }


def make_fetched(node: Node, params: dict[str, Any], check: bool) -> dict[str, Any]:
    packages, kept = params["packages"], Kept(Path(params["kept"]))
    # A repository that has changed since its index was read has other files than the index says.
    # Before a check run on a node that does not know the repository yet, there is none to read.
    there = params["sources_file"] and (not check or Path(params["sources_file"]).is_file())
    unread = read_index(node, params["sources_file"], kept, packages) if there else ""
    wanted = without_kept(kept, packages)
    missing = unknown(wanted, {}, node.known(list(wanted))) if wanted else []
    if params["expect_known"]:
        refuse_unknown(missing)
    before = node.installed([*packages, *params["replaces"]])
    # What the node runs it goes back to as it is, whatever the index names by now.
    install = wanted_state(packages, before)[0]
    words = [] if missing else keep(node, kept, packages, check, renew=install)
    # An interrupted dpkg answers no simulation; the transaction that ends it comes later.
    if install and not check and not node.audit():
        going = sorted(name for name in before if name not in packages)
        simulation = node.simulate(transaction(packages, going, True, kept, offline=False))
        along = comes_along(node, packages, simulation)
        words += keep(node, kept, along, check, renew=sorted(along)) if along else []
    return {
        "changed": bool(words),
        "fetched": words,
        "index_read": not unread,
        "looked_up": not missing,
        "warnings": [f"{unread} All its packages are kept on the node, so it went on."] if unread else [],
    }


def make_absent(node: Node, params: dict[str, Any], check: bool) -> dict[str, Any]:
    names = list(params["packages"])
    before = node.installed(names)
    interrupted = end_interrupted(node, check, {}, before)
    if interrupted:
        before = node.installed(names)
    if interrupted and not check:
        refuse_broken(node, list(before))
    if before:
        words = ["purge", "--allow-change-held-packages", *sorted(before)]
        if not (check and interrupted):
            refused = [name for name in parse_removals(node.simulate(words)) if name not in before]
            if refused:
                raise RefusedError(
                    "APT-REMOVES: removing {} would take {} along. Remove what needs it first, or name it as "
                    "well.".format(", ".join(sorted(before)), ", ".join(refused))
                )
        if not check:
            node.mark("unhold", list(before))
            node.apply(words)
    return {
        "changed": bool(before or interrupted),
        "installed": [],
        "removed": sorted(before),
        "held": [],
        "ended_interrupted": interrupted,
        "index_read": True,
        "looked_up": True,
        "diff": {"before": describe(names, before), "after": describe(names, {})},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "dict", "required": True},
            "state": {"type": "str", "choices": ["present", "absent", "fetched"], "default": "present"},
            "replaces": {"type": "list", "elements": "str", "default": []},
            "kept": {"type": "path"},
            "allow_downgrade": {"type": "bool", "default": False},
            "sources_file": {"type": "path"},
            "refresh": {"type": "bool", "default": False},
            "expect_known": {"type": "bool", "default": True},
            "seconds": {"type": "int", "default": 1200},
        },
        required_if=[("refresh", True, ["sources_file"]), ("state", "fetched", ["kept"])],
        supports_check_mode=True,
    )
    packages = module.params["packages"]
    wrong = malformed(packages)
    if wrong:
        module.fail_json(msg="APT-MALFORMED: {}. Write name: version, as the lock does.".format("; ".join(wrong)))
    make = {"present": make_present, "absent": make_absent, "fetched": make_fetched}[module.params["state"]]
    node = Node(module.run_command, module.params["seconds"])
    # A check run may look into the repository, and leaves what apt has read of it as it is.
    aside = module.check_mode and module.params["state"] == "fetched"
    try:
        with node.aside() if aside else nullcontext():
            result = make(node, module.params, module.check_mode) if packages else {"changed": False}
    except RefusedError as refused:
        module.fail_json(msg=str(refused))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
