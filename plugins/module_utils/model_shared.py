"""The tier between the store and a node's own disk: a folder that all nodes share.

`<folder>/<name>/<digest>/` is a whole version, named by one rename. One node fills it at a time, the others wait. The
lock spares downloads and nothing else rests on it: two that fill at once write the same compared bytes under names of
their own. Whoever holds it counts up in it; one who died is known by a count that stands still, on the waiting node's
own clock.

The folder may be slow, absent, full, read-only or hang for ever: it is touched by a process of its own alone, which
is left behind when it falls silent, and what went wrong is said and never fails a node. Python 3.9 and the standard
library alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import sync_folder
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_room import GIB, SPARE
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import (
    BLOCK,
    DIGITS,
    MANIFEST,
    ModelError,
    parse_manifest,
    problems,
)
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_watched import Tell, watched
from ansible_collections.gpuyard.fleet.plugins.module_utils.shared_storage import mounted_at

BEAT = 5.0
"""Seconds between two counts of who fills."""
STALE = 60.0
"""Seconds after which a count that stands still is one of the dead."""
POLL = 0.5
MOUNTINFO = Path("/proc/self/mountinfo")


class Store(Protocol):
    """Where a model comes from in the first place."""

    patience: float

    def size(self, path: str) -> int: ...

    def fetch(self, path: str, wanted: str, target: Path, tell: Tell | None = None) -> None: ...


@dataclass(frozen=True)
class Offer:
    """A version that lies in the shared folder."""

    manifest: bytes
    sizes: Mapping[str, int]


class Shared:
    """One version of a model in the shared folder. What went wrong stands in `said`."""

    def __init__(self, folder: Path, name: str, manifest_sha256: str, silence: float, wait: float) -> None:
        self.folder, self.wanted = folder, manifest_sha256
        self.home = folder / name
        self.version = self.home / manifest_sha256[:DIGITS]
        self.partial = self.home / f".{self.version.name}.partial"
        self.silence = silence
        self.deadline = time.monotonic() + wait
        self.said: list[str] = []

    # --- asked by the module; holds up nobody longer than `silence` without a word, and `wait` in all ---------------

    def look(self) -> Offer | None:
        """What lies there, if the whole version does."""
        found: list[Offer] = []
        for word in self._watched(self._look):
            if "manifest" in word:
                found.append(Offer(word["manifest"].encode(), word["sizes"]))
        return found[0] if found else None

    def bring(self, store: Store, manifest: bytes, waiting: Mapping[str, str], staging: Path) -> set[str]:
        """Copy files into the staging folder, after the version was filled from the store where it was not there.

        Returns the files that came, each compared; the others are to be had from the store.
        """
        came: set[str] = set()
        if self.said:
            return came  # it had its chance
        for word in self._watched(lambda tell: self._bring(tell, store, manifest, waiting, staging), store.patience):
            came.update(word.get("copied", ()))
        return came

    def _watched(self, work: Callable[[Tell], None], patience: float = 0) -> Iterator[dict[str, Any]]:
        try:
            for word in watched(work, self.silence, patience, self.deadline):
                if "said" in word:
                    self.said.append(word["said"])
                yield word
        except TimeoutError as late:
            rule = "MODEL-SHARED-SILENT" if late.args[0] else "MODEL-SHARED-LATE"
            self.said.append(
                f"{rule}: {self.folder} "
                + (f"gave no sign for {late.args[0]:g} s" if late.args[0] else "took longer than it may")
                + "; it is passed over. Look at its server and at the mount"
            )

    # --- done in a process of its own ------------------------------------------------------------------------------

    def _look(self, tell: Tell) -> None:
        self._refuse_absent()
        if not self._is_there():
            return
        with _regular(self.version / MANIFEST) as file:
            raw = file.read(16 * 1024 * 1024)
        found = hashlib.sha256(raw).hexdigest()
        if found != self.wanted:
            raise ModelError(
                "MODEL-HASH",
                f"{self.version / MANIFEST} has SHA-256 {found}, the lock says {self.wanted}; it is not used. "
                f"Remove {self.version}, and the next converge fills it again",
            )
        sizes = {}
        for path in parse_manifest(raw.decode()):
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = (self.version / path).lstat().st_size
        tell(manifest=raw.decode(), sizes=sizes)

    def _bring(self, tell: Tell, store: Store, manifest: bytes, waiting: Mapping[str, str], staging: Path) -> None:
        self._refuse_absent()
        self._await(tell, store, manifest)

        def bring(path: str) -> None:
            try:
                _copy(self.version / path, waiting[path], staging / path, tell)
            except ModelError as refused:
                tell(said=f"{refused}. It is taken from the store")
            else:
                tell(copied=[path])

        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(bring, waiting))

    def _refuse_absent(self) -> None:
        if self.folder.is_dir():
            return
        parent = self.folder.parent
        with contextlib.suppress(OSError):
            list(parent.iterdir())  # an automount mounts when it is read
        # Made on a mount alone: where the mount is away, the folder would fill the node's own disk.
        if mounted_at(str(parent), MOUNTINFO.read_text()) is None:
            raise ModelError(
                "MODEL-SHARED-ABSENT",
                f"{self.folder} is not there and {parent} is no mount; it is passed over. Mount it, or make the folder",
            )

    def _is_there(self) -> bool:
        # Listed, not looked up: NFS remembers for a while that a name was not there, and a listing asks anew.
        try:
            return self.version in list(self.home.iterdir())
        except FileNotFoundError:
            return False

    def _await(self, tell: Tell, store: Store, manifest: bytes) -> None:
        """Return when the version is there, whoever filled it."""
        lock = Lock(self.home / f".{self.version.name}.lock")
        seen, since = b"", time.monotonic()
        while not self._is_there():
            self.home.mkdir(mode=0o755, parents=True, exist_ok=True)
            if lock.take():
                try:
                    if not self._is_there():
                        tell(filling=True)
                        self._fill(tell, store, manifest)
                finally:
                    lock.release()
                    tell(filling=False)
                continue
            now = lock.text()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STALE:
                lock.break_open(now)
                since = time.monotonic()
            tell()
            time.sleep(POLL)

    def _fill(self, tell: Tell, store: Store, raw: bytes) -> None:
        manifest = parse_manifest(raw.decode())
        self.partial.mkdir(mode=0o755, exist_ok=True)
        for path in sorted(self.partial.rglob("*"), reverse=True):
            if path.relative_to(self.partial).as_posix() not in manifest and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        waiting = {path: digest for path, digest in manifest.items() if _digest(self.partial / path, tell) != digest}
        need = sum(store.size(path) for path in waiting) + SPARE
        have = shutil.disk_usage(self.home).free
        if have < need:
            raise ModelError(
                "MODEL-SHARED-FULL",
                f"{self.folder} has {have / GIB:.2f} GiB free, filling {self.version} needs {need / GIB:.2f} GiB; "
                f"it is passed over. Free {math.ceil((need - have) / 2**20)} MiB there",
            )
        for path in waiting:
            (self.partial / path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=4) as pool:
            for done in [pool.submit(store.fetch, path, waiting[path], self.partial / path, tell) for path in waiting]:
                done.result()
        if found := problems(self.partial, manifest, hashes=False):
            raise found[0]
        draft = self.partial / f"{MANIFEST}.{_token()}"
        draft.write_bytes(raw)
        for path in [draft, self.partial, *(path for path in self.partial.rglob("*") if path.is_dir())]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        draft.replace(self.partial / MANIFEST)
        sync_folder(self.partial)
        try:
            self.partial.rename(self.version)
        except OSError:
            if not self._is_there():  # nobody else was sooner
                raise
        sync_folder(self.home)


class Lock:
    """A file made by one node alone, in which it counts up while it lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = f"{socket.gethostname()} {_token()}"
        self.count = 0
        self.over = threading.Event()

    def take(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        os.close(descriptor)
        try:
            self._write()
        except OSError:
            self.path.unlink()  # nobody shall wait for one who cannot count
            raise
        self.over.clear()
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def text(self) -> bytes:
        try:
            with _regular(self.path) as file:
                return file.read(4096)
        except FileNotFoundError:
            return b""

    def is_mine(self) -> bool:
        return self.text().startswith(f"{self.owner} ".encode())

    def release(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            if self.is_mine():
                self.path.unlink()

    def break_open(self, seen: bytes) -> None:
        """Take away the lock of a dead owner. If it was another's by then, it is put back."""
        mine = self.path.with_name(f"{self.path.name}.{_token()}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(mine)
            if mine.read_bytes() != seen:
                with contextlib.suppress(FileExistsError):
                    os.link(mine, self.path)
            mine.unlink()

    def _beat(self) -> None:
        while not self.over.wait(BEAT):
            with contextlib.suppress(OSError):
                if not self.is_mine():
                    return
                self._write()

    def _write(self) -> None:
        self.count += 1
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.write(descriptor, f"{self.owner} {self.count:012d}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _regular(path: Path) -> Iterator[Any]:
    """A file opened for reading, never a link, a pipe or a device."""
    # Without O_NONBLOCK a pipe would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ModelError("MODEL-SPECIAL", f"{path} is no regular file; links and devices are not served")
        yield file


def _copy(source: Path, wanted: str, target: Path, tell: Tell) -> None:
    """One file to the node, compared while it is written; nothing stands there before it is whole."""
    part = target.with_name(f"{target.name}.shared")
    digest = hashlib.sha256()
    try:
        with _regular(source) as file, part.open("wb") as copy:
            while block := file.read(BLOCK):
                digest.update(block)
                copy.write(block)
                tell()
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as wrong:
        part.unlink(missing_ok=True)
        if wrong.errno == errno.EPIPE:
            raise
        rule = "MODEL-MISSING" if wrong.errno == errno.ENOENT else "MODEL-READ"
        raise ModelError(rule, f"{source} cannot be copied ({wrong.strerror})") from wrong
    if digest.hexdigest() != wanted:
        part.unlink()
        raise ModelError(
            "MODEL-HASH",
            f"{source} has SHA-256 {digest.hexdigest()}, {MANIFEST} says {wanted}; remove {source.parent} or put the "
            "right file there",
        )
    part.chmod(0o644)
    part.replace(target)


def _digest(path: Path, tell: Tell) -> str:
    """SHA-256 of what an earlier fill left, or nothing."""
    digest = hashlib.sha256()
    try:
        with _regular(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                tell()
    except (FileNotFoundError, ModelError):
        return ""
    return digest.hexdigest()


def _token() -> str:
    return os.urandom(8).hex()
