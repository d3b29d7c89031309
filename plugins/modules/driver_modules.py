#!/usr/bin/python
"""The kernel modules of a driver, built before its package is installed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.dkms import (
    LATE,
    MARK,
    OVERRIDES,
    RESTORE,
    TREE,
    RefusedError,
    aside,
    current,
    kernels,
    last_words,
    named,
    override,
    refused,
    sources,
)
from ansible_collections.gpuyard.fleet.plugins.module_utils.readiness import KEYS

DOCUMENTATION = r"""
module: driver_modules
short_description: Build the kernel modules of a driver with DKMS before its package is installed
description:
  - Builds the source in a package that is kept on the node with the node's own C(dkms), at the lowest priority and in a
    tree of its own, for the running kernel and for the newest one that would be booted. Nothing of the installed driver
    is touched. When the package is installed, DKMS finds the modules built.
  - Modules of a driver that is installed are taken over from DKMS's own tree, which its removal empties.
  - A package that brings modules ready to load, and a kernel without headers, have nothing to build.
options:
  state:
    description: C(built), or C(absent) for what was built for all versions but those to C(keep).
    type: str
    choices: [built, absent]
    default: built
  node:
    description: Name of the node, for the messages.
    type: str
    default: this node
  version:
    description: Version of the driver, for the messages.
    type: str
  packages:
    description: Packages that may bring the source, each with its exact version.
    type: dict
    default: {}
  kept:
    description: Folder with the files of the packages; what is built lies in its folder C(modules).
    type: path
  sets:
    description: Folder of all such folders, for C(absent).
    type: path
  keep:
    description: Versions whose modules stay, for C(absent).
    type: list
    elements: str
    default: []
  seconds:
    description: How long the build for one kernel may take.
    type: int
    default: 3600
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says what would be built.}
"""

EXAMPLES = r"""
- name: Build the modules of the kept driver
  gpuyard.fleet.driver_modules:
    version: 580.126.20
    packages: {nvidia-kernel-open-dkms: 580.126.20-1}
    kept: /var/lib/gpuyard/packages/580.126.20
"""

RETURN = r"""
built:
  description: Kernels that modules were, or would be, compiled for.
  returned: when state is built
  type: list
  elements: str
taken:
  description: Kernels whose modules were, or would be, taken over from DKMS's tree.
  returned: when state is built
  type: list
  elements: str
"""

SUMS, STAMP = "SHA256SUMS", "stamp.json"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Driver:
    """One version of a driver on this node, and what is kept of it."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.given = module.params
        self.kept = Path(self.given["kept"]) / "modules"
        self.tree = self.kept / "tree"
        self.arch = os.uname().machine

    def ask(self, *command: str) -> str:
        return self.module.run_command(list(command), check_rc=True)[1]

    def package(self) -> Optional[tuple[Path, str]]:
        """The kept package that brings a source, and the path of its dkms.conf."""
        for name, version in sorted(self.given["packages"].items()):
            for deb in sorted(Path(self.given["kept"]).glob("{}_{}_*.deb".format(name, version.replace(":", "%3a")))):
                listing = self.module.run_command(
                    ["sh", "-c", 'dpkg-deb --fsys-tarfile "$1" | tar -t', "-", str(deb)], check_rc=True
                )[1]
                found = sources(listing)
                if found:
                    return deb, found[0]
        return None

    def kernels(self) -> list[str]:
        modules = Path("/lib/modules")
        headers = [path.parent.parent.name for path in modules.glob("*/build/include")]
        bootable = [path.name[len("config-") :] for path in Path("/boot").glob("config-*")]
        return kernels(os.uname().release, [kernel for kernel in bootable if (modules / kernel).is_dir()], headers)

    def basis(self, deb: Path, kernel: str) -> dict[str, Any]:
        """All that modules for one kernel depend on."""
        build = Path(f"/lib/modules/{kernel}/build")
        versions = [build / "include/generated/compile.h", build / "include/config/auto.conf", build / "Module.symvers"]
        return {
            "package": digest(deb),
            "headers": {path.name: digest(path) for path in versions if path.is_file()},
            "keys": {key: digest(Path(key)) for key in KEYS if Path(key).is_file()},
        }

    def whole(self, folder: Path, basis: dict[str, Any]) -> bool:
        """Whether what is kept for a kernel is what would be built now, bit by bit what was kept."""
        try:
            stamp = json.loads((folder / "log" / STAMP).read_text())
        except (OSError, ValueError):
            return False
        checked = self.module.run_command(["sha256sum", "--check", "--status", SUMS], cwd=str(folder))[0]
        return checked == 0 and current(stamp, basis)

    def keep(self, built: Path, folder: Path, deb: Path, kernel: str) -> None:
        """Puts a folder of DKMS aside, whole or not at all. A build may have made the key: its basis is asked now."""
        half = folder.with_name(f".{folder.name}.half")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(built, half, symlinks=True)
        (half / "log").mkdir(exist_ok=True)
        (half / "log" / STAMP).write_text(json.dumps(self.basis(deb, kernel)))
        files = sorted(path for path in half.rglob("*") if path.is_file())
        (half / SUMS).write_text("".join(f"{digest(path)}  {path.relative_to(half)}\n" for path in files))
        self.ask("sync", "--file-system", str(half))
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)

    def compile(self, deb: Path, conf: str, name: str, version: str, kernel: str, folder: Path) -> None:
        dkms = self.module.get_bin_path("dkms")
        if not dkms:
            raise RefusedError(self.refused(kernel, "dkms is not installed (`apt-get install dkms` brings it)"))
        self.kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.kept, prefix=".half-") as scratch:
            root, tree = Path(scratch) / "root", Path(scratch) / "tree"
            tree.mkdir()
            self.ask("dpkg-deb", "--extract", str(deb), str(root))
            limit = self.given["seconds"]
            words = [*aside(limit), dkms, "build", "-m", name, "-v", version, "-k", kernel, "-a", self.arch]
            words += ["--dkmstree", str(tree), "--sourcetree", str(root / conf).rsplit("/", 2)[0]]
            code, out, err = self.module.run_command(words, environ_update={"LC_ALL": "C"})
            if code != 0:
                why = f"it took longer than {limit} s" if code in LATE else self.words(tree, out + err)
                raise RefusedError(self.refused(kernel, why))
            self.keep(tree / name / version / kernel / self.arch, folder, deb, kernel)

    def words(self, tree: Path, said: str) -> str:
        """The compiler's last words, or DKMS's own."""
        logs = sorted(tree.rglob("make.log"))
        return last_words(logs[0].read_text(errors="replace") if logs else said)

    def refused(self, kernel: str, why: str) -> str:
        return refused(self.given["node"], self.given["version"], kernel, why)

    def build(self, check: bool) -> dict[str, Any]:
        built: list[str] = []
        taken: list[str] = []
        found = self.package()
        wanted = self.kernels() if found else []
        if not found or not wanted:
            return {"changed": False, "built": built, "taken": taken}
        deb, conf = found
        text = self.module.run_command(
            ["sh", "-c", 'dpkg-deb --fsys-tarfile "$1" | tar -xO "$2"', "-", str(deb), conf], check_rc=True
        )[1]
        source = named(text)
        if source is None:
            return {"changed": False, "built": built, "taken": taken}
        name, version = source
        own = Path(OVERRIDES) / f"{name}-{version}.conf"
        if own.is_file() and not own.read_text().startswith(MARK):
            raise RefusedError(
                self.refused(
                    wanted[0], f"{own} is somebody's own; have it in {OVERRIDES}/{name}.conf, where it is read too"
                )
            )
        for kernel in wanted:
            folder = self.tree / name / version / kernel / self.arch
            if self.whole(folder, self.basis(deb, kernel)):
                continue
            there = Path(TREE) / name / version / kernel / self.arch
            installed = Path(f"{TREE}/{name}/kernel-{kernel}-{self.arch}").resolve() == there.resolve()
            (taken if installed and there.is_dir() else built).append(kernel)
            if check:
                continue
            if kernel in taken:
                self.keep(there, folder, deb, kernel)
            else:
                self.compile(deb, conf, name, version, kernel, folder)
        script = self.kept / "restore"
        # The hook last: it names what lies there by now.
        wanted_texts = [(script, RESTORE, 0o755), (own, override(str(self.tree), str(script), name, version), 0o644)]
        wrong = [(path, text, mode) for path, text, mode in wanted_texts if not stands(path, text, mode)]
        if not check:
            for path, text, mode in wrong:
                write(path, text, mode)
        return {"changed": bool(built or taken or wrong), "built": built, "taken": taken}


def stands(path: Path, text: str, mode: int) -> bool:
    return path.is_file() and path.read_text() == text and path.stat().st_mode & 0o777 == mode


def write(path: Path, text: str, mode: int) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_text(text)
    half.chmod(mode)
    half.replace(path)


def forget(module: AnsibleModule) -> dict[str, Any]:
    """Hooks of drivers that are kept no more, and trees that a killed build left."""
    sets = Path(module.params["sets"])
    kept = [f"{sets / version}/" for version in module.params["keep"]]
    gone: list[Path] = []
    for hook in Path(OVERRIDES).glob("*.conf"):
        text = hook.read_text()
        if text.startswith(MARK) and not any(folder in text for folder in kept):
            gone.append(hook)
    gone += list(sets.glob("*/modules/.half-*"))
    if not module.check_mode:
        for path in gone:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"changed": bool(gone)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["built", "absent"], "default": "built"},
            "node": {"type": "str", "default": "this node"},
            "version": {"type": "str"},
            "packages": {"type": "dict", "default": {}},
            "kept": {"type": "path"},
            "sets": {"type": "path"},
            "keep": {"type": "list", "elements": "str", "default": []},
            "seconds": {"type": "int", "default": 3600},
        },
        required_if=[("state", "built", ["version", "kept"]), ("state", "absent", ["sets"])],
        supports_check_mode=True,
    )
    try:
        absent = module.params["state"] == "absent"
        result = forget(module) if absent else Driver(module).build(module.check_mode)
    except RefusedError as refusal:
        module.fail_json(msg=str(refusal))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
