#!/usr/bin/python
"""Store a model as a verified directory."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import (
    BLOCK,
    DIGITS,
    MANIFEST,
    ModelError,
    digest_of,
    parse_manifest,
    problems,
)

DOCUMENTATION = r"""
module: model_dir
short_description: Store a model as a verified directory
description:
  - Fetches a model from an artefact store and puts it at C(<root>/<name>/<digest>), the digest being the first 12 hex
    digits of the SHA-256 of its manifest.
  - Every byte is compared with the manifest before the directory gets its name, by one rename; a run that was killed
    leaves nothing that could be taken for a model. What such a run had fetched is used again only after its bytes
    were compared anew.
  - Refuses pickles, code, C(auto_map), paths that leave the directory, and an index that names shards nobody brought.
options:
  name:
    description: The model's name, its folder in the store and below O(root).
    type: str
    required: true
  uri:
    description: The store; the manifest is read from C(<uri>/<name>/MANIFEST.sha256).
    type: str
    required: true
  manifest_sha256:
    description: SHA-256 of the manifest, from the fleet's lock. A store that serves another is refused.
    type: str
    required: true
  root:
    description: Folder of all models.
    type: path
    default: /var/lib/models
  keep:
    description: How many versions of the model stay on the node, the newest first; the wanted one is always among them.
    type: int
    default: 2
  references:
    description: Files that name the versions in use, such as engine configurations. What they name is kept.
    type: list
    elements: path
    default: []
  full_check:
    description: Read every byte of a model that is there already, and fetch it again if one is wrong.
      Otherwise a file counts as unchanged while its size and its time of change are.
    type: bool
    default: false
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says whether the model would be fetched.}
  diff_mode: {support: full, description: Shows the directory that comes and those that go.}
"""

EXAMPLES = r"""
- name: Store a model
  gpuyard.fleet.model_dir:
    name: smollm2-135m-instruct
    uri: http://10.77.0.1:8099/models
    manifest_sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
"""

RETURN = r"""
path:
  description: The model's directory.
  returned: success
  type: str
fetched:
  description: How many files were fetched in this run.
  returned: success
  type: int
removed:
  description: Old versions that were removed.
  returned: success
  type: list
  elements: str
"""

TRIES = 3
SILENCE = 60
"""Seconds without a byte after which a download is given up and tried again."""
SPARE = 256 * 1024 * 1024
"""Bytes that stay free beside the model: a full disk stops more than this download."""


class Store:
    """Reads one model's files over HTTP."""

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

    def fetch(self, path: str, wanted: str, target: Path) -> None:
        """Bring one file to its place, compared while it comes; nothing stands there before it is whole."""
        part = target.with_name(target.name + ".part")
        for left in reversed(range(TRIES)):
            digest = hashlib.sha256()
            try:
                with self.open(path) as response, part.open("wb") as file:
                    while block := response.read(BLOCK):
                        digest.update(block)
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
            except http.client.HTTPException:
                if not left:
                    raise
                continue
            except OSError as error:
                if error.errno == errno.ENOSPC or not left:
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


class Model:
    """One version of a model on this node."""

    def __init__(self, root: Path, name: str, digest: str) -> None:
        self.home = root / name
        self.path = self.home / digest[:DIGITS]
        self.staging = self.home / f".{digest[:DIGITS]}.partial"
        self.record = self.home / f".{digest[:DIGITS]}.stat"

    def is_whole(self, full: bool) -> bool:
        """Whether the version is there: by sizes and times, and by every byte where those differ or when asked."""
        try:
            raw = (self.path / MANIFEST).read_bytes()
            manifest = parse_manifest(raw.decode())
        except (OSError, UnicodeDecodeError, ModelError):
            return False
        if hashlib.sha256(raw).hexdigest()[:DIGITS] != self.path.name:
            return False
        known = self._known()
        untouched = known is not None and known == self._stat(manifest)
        return not problems(self.path, manifest, hashes=full or not untouched)

    def remember(self) -> None:
        """Write down how the files look, so that the next run need not read them."""
        manifest = parse_manifest((self.path / MANIFEST).read_text(encoding="utf-8"))
        now = self._stat(manifest)
        if now is not None and self._known() != now:
            draft = self.record.with_name(self.record.name + ".new")
            draft.write_text(json.dumps(now), encoding="utf-8")
            draft.replace(self.record)

    def _known(self) -> dict[str, list[int]] | None:
        try:
            return json.loads(self.record.read_bytes())
        except (OSError, ValueError):
            return None

    def _stat(self, manifest: dict[str, str]) -> dict[str, list[int]] | None:
        try:
            seen = {path: (self.path / path).lstat() for path in [*manifest, MANIFEST]}
        except OSError:
            return None
        return {path: [status.st_size, status.st_mtime_ns] for path, status in seen.items()}

    def bring(self, store: Store, raw: bytes) -> int:
        """Fetch into the staging folder, compare all, then give the folder its name. Returns the files fetched."""
        manifest = parse_manifest(raw.decode())
        self.staging.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if path.relative_to(self.staging).as_posix() not in manifest and not path.is_dir():
                path.unlink()
        # What an earlier run left is believed only after its bytes were read.
        waiting = {path: digest for path, digest in manifest.items() if not self._is_there(path, digest)}
        self._refuse_small_disk(store, waiting)
        for path in waiting:
            (self.staging / path).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=4) as pool:
            for done in [
                pool.submit(store.fetch, path, digest, self.staging / path) for path, digest in waiting.items()
            ]:
                done.result()
        if found := problems(self.staging, manifest, hashes=False):
            shutil.rmtree(self.staging)
            raise found[0]
        (self.staging / MANIFEST).write_bytes(raw)
        for path in [self.staging / MANIFEST, self.staging, *(p for p in self.staging.rglob("*") if p.is_dir())]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            _sync(path)
        if self.path.exists():
            old = self.home / f".{self.path.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
            self.staging.rename(self.path)
            shutil.rmtree(old)
        else:
            self.staging.rename(self.path)
        _sync(self.home)
        return len(waiting)

    def _is_there(self, path: str, digest: str) -> bool:
        file = self.staging / path
        return file.is_file() and not file.is_symlink() and digest_of(file) == digest

    def _refuse_small_disk(self, store: Store, waiting: dict[str, str]) -> None:
        need = sum(store.size(path) for path in waiting) + SPARE
        have = shutil.disk_usage(self.home).free
        if have < need:
            raise ModelError(
                "MODEL-DISK",
                f"{self.home} has {have / 2**30:.2f} GiB free, the model needs {need / 2**30:.2f} GiB; "
                f"free {(need - have) / 2**30:.2f} GiB more, or give {self.home.parent} a larger disk",
            )

    def superseded(self, keep: int, references: list[str]) -> list[Path]:
        """Older versions beyond the number to keep that no file names, and what killed runs left of others."""
        if not self.home.is_dir():
            return []
        folders = [path for path in self.home.iterdir() if path.is_dir()]
        remains = [path for path in folders if path.name.startswith(".") and path != self.staging]
        versions = [path for path in folders if not path.name.startswith(".")]
        others = sorted((path for path in versions if path != self.path), key=lambda path: -path.stat().st_mtime)
        texts = [Path(reference).read_text(encoding="utf-8") for reference in references if Path(reference).is_file()]
        return remains + [path for path in others[keep - 1 :] if not any(str(path) in text for text in texts)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def store_model(arguments: dict, check_mode: bool) -> dict:
    """Bring the node to the wanted version; returns what Ansible reports."""
    model = Model(Path(arguments["root"]), arguments["name"], arguments["manifest_sha256"])
    whole = model.is_whole(arguments["full_check"])
    fetched = 0
    if not whole:
        store = Store(arguments["uri"], arguments["name"])
        raw = store.manifest(arguments["manifest_sha256"])
        parse_manifest(raw.decode())
        if not check_mode:
            try:
                fetched = model.bring(store, raw)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise ModelError(
                        "MODEL-DISK", f"the disk of {model.home} filled up while the model came; free some space"
                    ) from error
                raise
    old = model.superseded(arguments["keep"], arguments["references"])
    if not check_mode:
        model.remember()
        for path in old:
            # Renamed first: a folder half removed must not keep the name of a model.
            gone = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(gone)
            path.with_name(f".{path.name}.stat").unlink(missing_ok=True)
    before = [str(path) for path in old] + ([str(model.path)] if whole else [])
    return {
        "changed": not whole or bool(old),
        "path": str(model.path),
        "fetched": fetched,
        "removed": [str(path) for path in old],
        "diff": {"before": "".join(f"{p}\n" for p in sorted(before)), "after": f"{model.path}\n"},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "uri": {"type": "str", "required": True},
            "manifest_sha256": {"type": "str", "required": True},
            "root": {"type": "path", "default": "/var/lib/models"},
            "keep": {"type": "int", "default": 2},
            "references": {"type": "list", "elements": "path", "default": []},
            "full_check": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**store_model(module.params, module.check_mode))
    except ModelError as refused:
        module.fail_json(msg=str(refused), rule=refused.rule)


if __name__ == "__main__":
    main()
