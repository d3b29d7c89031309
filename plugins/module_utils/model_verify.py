#!/usr/bin/python3
"""What a stored model must be, in one place: the module `model_dir` stores by these rules, a unit starts by them.

A model is a directory that holds `MANIFEST.sha256` (the format of sha256sum, sorted by path) and exactly the files it
names. The directory is named after the manifest: the first twelve hex digits of the manifest's own SHA-256.

As a program: `model_verify.py DIRECTORY` reads every byte, prints one line and ends with 0, or names each file that is
not as it should be, with the rule it breaks, and ends with 1. Runs with Python 3.9 and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "MANIFEST.sha256"
DIGITS = 12
"""How many hex digits of the manifest's SHA-256 name the directory."""

BLOCK = 4 * 1024 * 1024
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
PROGRAMS = (".py", ".pyc", ".so")
LINE = re.compile(r"([0-9a-f]{64})  (\S(?:.*\S)?)")


class ModelError(Exception):
    """The model breaks a rule. `rule` is its id, the text says what was found and what to do."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


def parse_manifest(text: str) -> dict[str, str]:
    """Path → SHA-256 of a manifest that asks for nothing a model may not have."""
    files: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.fullmatch(line)
        if not match:
            raise ModelError(
                "MODEL-MANIFEST",
                f"line {number} of {MANIFEST} is {line[:120]!r}; a line is 64 hex digits, two spaces and a path. "
                "Write it with `sha256sum`",
            )
        digest, path = match.groups()
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in path or not path.isprintable() or path == MANIFEST:
            raise ModelError(
                "MODEL-PATH",
                f"line {number} of {MANIFEST} names {path!r}; a path stays inside the model's directory, "
                "without '..', '.', '//', a leading '/' or a backslash, and is not the manifest itself",
            )
        if path in files:
            raise ModelError("MODEL-MANIFEST", f"{MANIFEST} names {path!r} twice; one line for each file")
        refuse_by_name(path)
        files[path] = digest
    if not files:
        raise ModelError("MODEL-MANIFEST", f"{MANIFEST} names no file; a model has at least one")
    return files


def refuse_by_name(path: str) -> None:
    """Refuse what runs code when it is loaded, judged by its name."""
    suffix = Path(path).suffix.lower()
    if suffix in PICKLES:
        raise ModelError(
            "MODEL-PICKLE",
            f"{path} is a pickle by its name, and loading a pickle runs its code. Serve the model's safetensors files",
        )
    if suffix in PROGRAMS:
        raise ModelError(
            "MODEL-REMOTE-CODE",
            f"{path} is code, and a model brings none. Serve a model that the engine knows, without the file",
        )


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def files_in(directory: Path) -> list[str]:
    """Every path below a directory, folders left out, links never followed."""
    found: list[str] = []
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        # os.walk counts a link to a folder among the folders and does not enter it: to us it is a thing of its own.
        links = [name for name in folders if (here / name).is_symlink()]
        found += [(here / name).relative_to(directory).as_posix() for name in files + links]
    return sorted(found)


def read_manifest(directory: Path) -> dict[str, str]:
    """The manifest of a stored model, which must be the one that the directory is named after."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(
            "MODEL-MISSING", f"{path} cannot be read ({error.strerror}); it says what the model is made of"
        ) from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest[:DIGITS] != directory.name:
        raise ModelError(
            "MODEL-HASH",
            f"{path} has SHA-256 {digest}, and its directory is named {directory.name}; the manifest was changed",
        )
    try:
        return parse_manifest(raw.decode())
    except UnicodeDecodeError as error:
        raise ModelError("MODEL-MANIFEST", f"{path} is not UTF-8 text") from error


def problems(directory: Path, manifest: dict[str, str], *, hashes: bool = True) -> list[ModelError]:
    """All that is wrong with a model's directory, file by file; with `hashes` every byte is read."""
    found: list[ModelError] = []
    present = files_in(directory)
    for path in present:
        try:
            if path not in manifest and path != MANIFEST:
                refuse_by_name(path)  # the stronger reason first: an extra file that is a pickle is named as one
                raise ModelError(
                    "MODEL-EXTRA", f"{directory / path} is not in {MANIFEST}; a model holds what its manifest names"
                )
            if not stat.S_ISREG((directory / path).lstat().st_mode):
                raise ModelError(
                    "MODEL-SPECIAL", f"{directory / path} is no regular file; links and devices are not served"
                )
        except ModelError as refused:
            found.append(refused)
    missing = sorted(set(manifest) - set(present))
    found += [
        ModelError("MODEL-MISSING", f"{directory / path} is named in {MANIFEST} and is not there") for path in missing
    ]
    whole = [path for path in sorted(manifest) if path in present and (directory / path).is_file()]
    for path in whole:
        try:
            refuse_by_content(directory, path, manifest)
        except ModelError as refused:
            found.append(refused)
    if hashes:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            wrong = pool.map(lambda path: _wrong_bytes(directory / path, manifest[path]), whole)
            found += [refused for refused in wrong if refused]
    return found


def _wrong_bytes(path: Path, wanted: str) -> ModelError | None:
    try:
        digest = digest_of(path)
    except OSError as error:
        return ModelError(
            "MODEL-READ", f"{path} cannot be read ({error.strerror}); look for a failing disk or its mode"
        )
    if digest == wanted:
        return None
    return ModelError(
        "MODEL-HASH",
        f"{path} has SHA-256 {digest}, {MANIFEST} says {wanted}; the file is not the one that was stored",
    )


def refuse_by_content(directory: Path, path: str, manifest: dict[str, str]) -> None:
    """Refuse a configuration that asks for code of its own, and an index whose shards are not all there."""
    if path.endswith("config.json"):
        if _holds_key(_json(directory / path), "auto_map"):
            raise ModelError(
                "MODEL-REMOTE-CODE",
                f"{directory / path} has an `auto_map`, which makes the engine load code that came with the model. "
                "Serve a model that the engine knows, without `auto_map`",
            )
    elif path.endswith(".index.json"):
        index = _json(directory / path)
        weights = index.get("weight_map") if isinstance(index, dict) else None
        shards = set(weights.values()) if isinstance(weights, dict) else set()
        folder = path.rpartition("/")[0]
        named = {f"{folder}/{shard}" if folder else str(shard) for shard in shards}
        if absent := sorted(named - set(manifest)):
            raise ModelError(
                "MODEL-MISSING",
                f"{directory / path} names the shard {absent[0]}"
                + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
                + f" that {MANIFEST} does not have; the model is not whole",
            )


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("MODEL-CONFIG", f"{path} is no JSON that can be read ({error})") from error


def _holds_key(value: object, key: str) -> bool:
    """Whether the key stands anywhere in a JSON value; its depth is bounded by what the JSON reader let through."""
    waiting = [value]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            if key in here:
                return True
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here
    return False


def main(arguments: list[str]) -> int:
    """Verify one directory, as the program of a unit's start."""
    if len(arguments) != 1:
        print("usage: model_verify.py DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    started = time.monotonic()
    try:
        manifest = read_manifest(directory)
        found = problems(directory, manifest)
    except ModelError as refused:
        found = [refused]
        manifest = {}
    if found:
        for refused in found:
            print(refused, file=sys.stderr)
        print(
            f"The model in {directory} is not started. To fetch it again from the store, run site.yml with "
            "-e model_store_full_check=true",
            file=sys.stderr,
        )
        return 1
    print(f"{directory}: {len(manifest)} files are as their manifest says ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
