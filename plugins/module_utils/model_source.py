"""The store of models, read over HTTP and compared while it comes. Python 3.9 and the standard library alone."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import BLOCK, MANIFEST, ModelError

TRIES = 3
SILENCE = 60
"""Seconds without a byte after which a download is given up and tried again."""
SYNC_EVERY = 16
"""Blocks after which a shared folder gets what was written: all at the end would look like a server that hangs."""


class Store:
    """Reads one model's files over HTTP."""

    patience = SILENCE * TRIES
    """Seconds after which a request has come to its end, for better or worse."""

    def __init__(self, uri: str, name: str) -> None:
        if urllib.parse.urlsplit(uri).scheme not in ("http", "https"):
            raise ModelError("MODEL-SOURCE", f"{uri!r} is no http or https address; give the address of the store")
        self.base = f"{uri.rstrip('/')}/{urllib.parse.quote(name)}"

    def open(self, path: str, method: str = "GET") -> http.client.HTTPResponse:
        url = f"{self.base}/{urllib.parse.quote(path)}"
        for left in reversed(range(TRIES)):
            try:
                return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=SILENCE)  # noqa: S310 - scheme was checked
            except urllib.error.HTTPError as error:
                if error.code < 500 or not left:
                    raise ModelError(
                        "MODEL-SOURCE", f"{url} answers {error.code} {error.reason}; put the model into the store"
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                if not left:
                    raise ModelError(
                        "MODEL-SOURCE", f"{url} cannot be read ({error}); see that the store runs and is reachable"
                    ) from error
        raise AssertionError("the loop returns or raises")

    def manifest(self, wanted: str) -> bytes:
        with self.open(MANIFEST) as response:
            raw = response.read(16 * 1024 * 1024)
        found = hashlib.sha256(raw).hexdigest()
        if found != wanted:
            raise ModelError(
                "MODEL-LOCK",
                f"{self.base}/{MANIFEST} has SHA-256 {found}, the lock says {wanted}; "
                "the store holds another version. Put the locked one there, or lock the fleet anew",
            )
        return raw

    def size(self, path: str) -> int:
        with self.open(path, "HEAD") as response:
            length = response.headers.get("Content-Length")
        if length is None:
            raise ModelError("MODEL-SOURCE", f"{self.base}/{path} comes without a length; use a store that gives one")
        return int(length)

    def fetch(self, path: str, wanted: str, target: Path, tell: Callable[[], None] | None = None) -> None:
        """Bring one file to its place, compared while it comes; nothing stands there before it is whole.

        Whoever fills a shared folder is told of each block, and writes under a name of his own.
        """
        part = target.with_name(f"{target.name}.{os.urandom(8).hex() if tell else ''}part")
        for left in reversed(range(TRIES)):
            digest = hashlib.sha256()
            try:
                with self.open(path) as response, part.open("wb") as file:
                    blocks = 0
                    while block := response.read(BLOCK):
                        digest.update(block)
                        file.write(block)
                        blocks += 1
                        if tell:
                            tell()
                            if blocks % SYNC_EVERY == 0:
                                file.flush()
                                os.fsync(file.fileno())
                    file.flush()
                    os.fsync(file.fileno())
            except http.client.HTTPException:
                if not left:
                    raise
                continue
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EROFS) or not left:
                    part.unlink(missing_ok=True)
                    raise
                continue
            if digest.hexdigest() == wanted:
                part.chmod(0o644)
                part.replace(target)
                return
        part.unlink()
        raise ModelError(
            "MODEL-HASH",
            f"{self.base}/{path} has SHA-256 {digest.hexdigest()}, {MANIFEST} says {wanted}; "
            "the store's copy is damaged or was changed. Put the right file there",
        )
