"""The files that say which engines a node runs and how: read, kept before an upgrade, put back after one that failed.

The environments that they name lie side by side and are not among them. Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ansible_collections.gpuyard.fleet.plugins.module_utils.kept_note import sync_folder

SETTINGS = "etc/vllm"
UNITS = "etc/systemd/system"
KEPT = "var/lib/gpuyard/engines-before"
MANIFEST = "MANIFEST.json"


class SettingsError(Exception):
    """What was found, why it is refused, the smallest change that would pass."""


def files(root: Path) -> list[Path]:
    """Every file of the engines' settings, keys and units."""
    found = [path for path in (root / SETTINGS).rglob("*") if path.is_file()]
    found += (root / UNITS).glob("vllm@.service")
    found += (root / UNITS).glob("vllm@*.service.d/*.conf")
    return sorted(found)


def engines(root: Path) -> dict[str, dict[str, Any]]:
    """Of each model that the node serves: its engine's environment, the path of its weights, its port."""
    found: dict[str, dict[str, Any]] = {}
    for conf in sorted((root / UNITS).glob("vllm@*.service.d/gpuyard.conf")):
        told = dict(re.findall(r"^Environment=GPUYARD_(ENGINE|MODEL|PORT)=(.*)$", conf.read_text(), re.MULTILINE))
        if len(told) != 3:
            raise SettingsError(f"ENGINE-SETTINGS: {conf} names no engine, model or port. Run playbooks/site.yml")
        name = conf.parent.name[len("vllm@") : -len(".service.d")]
        found[name] = {
            "environment": Path(told["ENGINE"]).name,
            "path": told["MODEL"],
            "port": int(told["PORT"]),
        }
    return found


def refuse_other_models(found: dict[str, dict[str, Any]], models: list[dict[str, Any]]) -> None:
    """Raises SettingsError where more is asked for than that the same models run on other engines or settings."""
    now = {name: (told["path"], int(told["port"])) for name, told in found.items()}
    asked = {told["name"]: (told["path"], int(told["port"])) for told in models}
    for name in sorted({*now, *asked}):
        if now.get(name) != asked.get(name):
            has, wants = (
                "{} on port {}".format(*told[name]) if name in told else "nothing of that name" for told in (now, asked)
            )
            raise SettingsError(
                f"UPGRADE-MODELS: for {name} this node serves {has}, and the lock says {wants}. Models, their weights "
                "and their ports are changed by playbooks/site.yml: lock that first, converge, and then lock the engine"
            )


def keep(root: Path) -> bool:
    """Copy all of them aside, whole or not at all; whether what lay there was another set."""
    now = _now(root)
    kept = root / KEPT
    if now == _manifest(kept):
        return False
    half = kept.with_name(kept.name + ".new")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(mode=0o700, parents=True)
    for name in now:
        copy = half / name
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(copy, (root / name).read_bytes(), (root / name).stat().st_mode & 0o777)
    _write(half / MANIFEST, json.dumps(now, indent=1).encode(), 0o600)
    shutil.rmtree(kept, ignore_errors=True)
    half.replace(kept)
    sync_folder(kept.parent)
    return True


def restore(root: Path) -> list[str]:
    """Put the kept ones back and take away what came since; the paths that changed. Done again, it changes nothing."""
    kept = root / KEPT
    manifest = _manifest(kept)
    if not manifest:
        raise SettingsError(f"ENGINE-KEPT: there is no whole set of settings in /{KEPT}, so none can be put back")
    for name, digest in manifest.items():
        if not (kept / name).is_file() or _digest(kept / name) != digest:
            raise SettingsError(f"ENGINE-KEPT: /{KEPT}/{name} is not the file that was kept. Bring it with site.yml")
    now = _now(root)
    changed = sorted(name for name in {*now, *manifest} if now.get(name) != manifest.get(name))
    for name in changed:
        path = root / name
        if name not in manifest:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.gpuyard")
        _write(half, (kept / name).read_bytes(), (kept / name).stat().st_mode & 0o777)
        half.replace(path)
        sync_folder(path.parent)
    return changed


def _now(root: Path) -> dict[str, str]:
    """What lies on the node: SHA-256 of each file, by its path below the root."""
    return {str(path.relative_to(root)): _digest(path) for path in files(root)}


def _manifest(kept: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((kept / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, content: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
