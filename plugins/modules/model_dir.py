#!/usr/bin/python
"""Store a model as a verified directory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import sync_folder
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_ahead import MEMINFO, SHARE, available, read_ahead
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_room import (
    GIB,
    Room,
    give_up,
    held_in,
    kept,
    mark_used,
    record_of,
    to_give_up,
)
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_shared import Shared
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_source import Store
from ansible_collections.gpuyard.fleet.plugins.module_utils.model_verify import (
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
  - With O(shared) the files come from a folder that all nodes share, which one node fills from the store. With
    O(budget_gib) versions that nothing needs are given up before a new one comes, least recently used first.
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
  locked:
    description: All models that the lock wants on this node, each with C(name) and C(manifest_sha256). None of them
      is given up.
    type: list
    elements: dict
    default: []
  budget_gib:
    description: GiB that all models of the node may take together. 0 is no bound, and then none is given up.
    type: int
    default: 0
  shared:
    description: A folder that all nodes share. Empty for none. One that is slow, absent, full or read-only is passed
      over with a warning.
    type: path
    default: ""
  shared_seconds:
    description: Seconds without a sign of life after which the shared folder is passed over.
    type: int
    default: 30
  shared_wait_seconds:
    description: Seconds that the shared folder may take in all, with waiting for another node that fills it.
    type: int
    default: 1800
  read_ahead:
    description: Read the model's files once, as far as half of the available memory goes.
    type: bool
    default: false
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
shared:
  description: How many of them came from the shared folder.
  returned: success
  type: int
said:
  description: What was passed over, and by which rule.
  returned: success
  type: list
  elements: str
removed:
  description: Old versions that were removed or given up.
  returned: success
  type: list
  elements: str
"""


class Model:
    """One version of a model on this node."""

    def __init__(self, root: Path, name: str, digest: str) -> None:
        self.home = root / name
        self.path = self.home / digest[:DIGITS]
        self.staging = self.home / f".{digest[:DIGITS]}.partial"
        self.record = record_of(self.path)

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
        elif now is not None:
            os.utime(self.record)  # it was used now

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

    def lacking(self, manifest: dict[str, str]) -> dict[str, str]:
        """The files that the staging folder lacks. What an earlier run left is believed only after it was read."""
        return {path: digest for path, digest in manifest.items() if not self._is_there(path, digest)}

    def begin(self, manifest: dict[str, str]) -> None:
        """Make the staging folder, without what does not belong there."""
        self.staging.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.staging.rglob("*"), reverse=True):
            if path.relative_to(self.staging).as_posix() not in manifest and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        for path in manifest:
            (self.staging / path).parent.mkdir(parents=True, exist_ok=True)

    def fetch(self, store: Store, waiting: Mapping[str, str]) -> None:
        """Fetch files into the staging folder."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            for done in [
                pool.submit(store.fetch, path, digest, self.staging / path) for path, digest in waiting.items()
            ]:
                done.result()

    def finish(self, raw: bytes, manifest: dict[str, str]) -> None:
        """Look at the whole, then give the folder its name."""
        if found := problems(self.staging, manifest, hashes=False):
            shutil.rmtree(self.staging)
            raise found[0]
        (self.staging / MANIFEST).write_bytes(raw)
        for path in [self.staging / MANIFEST, self.staging, *(p for p in self.staging.rglob("*") if p.is_dir())]:
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync_folder(path)
        if self.path.exists():
            old = self.home / f".{self.path.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
            self.staging.rename(self.path)
            shutil.rmtree(old)
        else:
            self.staging.rename(self.path)
        sync_folder(self.home)

    def _is_there(self, path: str, digest: str) -> bool:
        file = self.staging / path
        return file.is_file() and not file.is_symlink() and digest_of(file) == digest

    def superseded(self, keep: int, texts: list[str]) -> list[Path]:
        """Older versions beyond the number to keep that no file names, and what killed runs left of others."""
        if not self.home.is_dir():
            return []
        folders = [path for path in self.home.iterdir() if path.is_dir()]
        remains = [path for path in folders if path.name.startswith(".") and path != self.staging]
        versions = [path for path in folders if not path.name.startswith(".")]
        others = sorted((path for path in versions if path != self.path), key=lambda path: -path.stat().st_mtime)
        return remains + [path for path in others[keep - 1 :] if not any(str(path) in text for text in texts)]


def make_room(arguments: dict, model: Model, need: int, texts: list[str]) -> list[Path]:
    """Give up what nothing needs until so many bytes fit; returns what went."""
    root = Path(arguments["root"])
    held = held_in(root)
    locked = {model.path, *(Model(root, one["name"], one["manifest_sha256"]).path for one in arguments["locked"])}
    stays = kept(held, locked, arguments["keep"], texts)
    room = Room(arguments["budget_gib"] * GIB, shutil.disk_usage(root).free)
    given = to_give_up(arguments["name"], need, root, held, stays, room, model.path)
    for path in given:
        give_up(path)
    return given


def bring(arguments: dict, model: Model, texts: list[str]) -> dict:
    """Bring the wanted version from the nearest tier that has it; returns where its files came from and what went."""
    store = Store(arguments["uri"], arguments["name"])
    wanted, shared, offer = arguments["manifest_sha256"], None, None
    if arguments["shared"]:
        limits = arguments["shared_seconds"], arguments["shared_wait_seconds"]
        shared = Shared(Path(arguments["shared"]), arguments["name"], wanted, *limits)
        offer = shared.look()
    raw = offer.manifest if offer else store.manifest(wanted)
    manifest = parse_manifest(raw.decode())
    waiting = model.lacking(manifest)
    sizes = offer.sizes if offer else {}
    need = sum(sizes[path] if path in sizes else store.size(path) for path in waiting)
    given = make_room(arguments, model, need, texts)
    model.begin(manifest)
    came = shared.bring(store, raw, waiting, model.staging) if shared else set()
    model.begin(manifest)  # without what a copy that was given up has left
    model.fetch(store, {path: digest for path, digest in waiting.items() if path not in came})
    model.finish(raw, manifest)
    return {"fetched": len(waiting), "shared": len(came), "said": shared.said if shared else [], "given": given}


def read_model(model: Model) -> list[str]:
    """Read the model's files once, the largest first; returns what there is to say."""
    files = sorted((p for p in model.path.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, p))
    bound = int(available(MEMINFO.read_text(encoding="utf-8")) * SHARE)
    _, left = read_ahead(files, bound)
    if not left:
        return []
    return [
        f"MODEL-AHEAD: {len(left)} of {len(files)} files of {model.path} were not read ahead, "
        f"half of the available memory is {bound / GIB:.2f} GiB; the engine reads them from the disk"
    ]


def store_model(arguments: dict, check_mode: bool) -> dict:
    """Bring the node to the wanted version; returns what Ansible reports."""
    model = Model(Path(arguments["root"]), arguments["name"], arguments["manifest_sha256"])
    named = [Path(reference) for reference in arguments["references"]]
    texts = [path.read_text(encoding="utf-8") for path in named if path.is_file()]
    whole = model.is_whole(arguments["full_check"])
    done: dict = {"fetched": 0, "shared": 0, "said": [], "given": []}
    if not whole and check_mode:
        parse_manifest(Store(arguments["uri"], arguments["name"]).manifest(arguments["manifest_sha256"]).decode())
    elif not whole:
        try:
            done = bring(arguments, model, texts)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ModelError(
                    "MODEL-DISK", f"the disk of {model.home} filled up while the model came; free some space"
                ) from error
            raise
    old = model.superseded(arguments["keep"], texts)
    if not check_mode:
        model.remember()
        mark_used(Path(arguments["root"]), texts)
        for path in old:
            give_up(path)
        if arguments["read_ahead"]:
            done["said"] += read_model(model)
    gone = done.pop("given") + old
    before = [str(path) for path in gone] + ([str(model.path)] if whole else [])
    return {
        **done,
        "changed": not whole or bool(old),
        "path": str(model.path),
        "removed": [str(path) for path in gone],
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
            "locked": {"type": "list", "elements": "dict", "default": []},
            "budget_gib": {"type": "int", "default": 0},
            "shared": {"type": "path", "default": ""},
            "shared_seconds": {"type": "int", "default": 30},
            "shared_wait_seconds": {"type": "int", "default": 1800},
            "read_ahead": {"type": "bool", "default": False},
            "full_check": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        done = store_model(module.params, module.check_mode)
    except ModelError as refused:
        module.fail_json(msg=str(refused), rule=refused.rule)
    for said in done["said"]:
        module.warn(said)
    module.exit_json(**done)


if __name__ == "__main__":
    main()
