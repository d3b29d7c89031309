"""A folder that plays a node with simulated GPUs: the role's hardware file, the real nvidia-smi, the lab's NVML."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from gpuyard.lab import nvml
from gpuyard.lab.packages import recipes
from gpuyard.lab.place import default_cache

ROLE = Path(__file__).resolve().parents[2] / "roles/lab_gpu"
VERSION = "580.126.20"
SCRATCH = tempfile.TemporaryDirectory(prefix="gpuyard-nvml-")  # gone when the tests have ended
LOADED = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (gpuyard@lab)\n"


@functools.cache
def boards() -> dict[str, Any]:
    return DataLoader().load_from_file(str(ROLE / "vars/main.yml"), trusted_as_template=True)["__lab_gpu_boards"]


def hardware(board: str, count: int) -> str:
    """gpus.json as the role writes it."""
    variables = {
        "__lab_gpu_boards": boards(),
        "lab_gpu_model": board,
        "lab_gpu_count": count,
        "inventory_hostname": "t-chat-0",
    }
    source = trust_as_template((ROLE / "templates/gpus.json.j2").read_text())
    templar = Templar(DataLoader(), variables=variables)
    return templar.template(source, escape_backslashes=False, overrides={"trim_blocks": True})


@functools.cache
def smi() -> Path:
    """The real nvidia-smi, which only set-up can fetch."""
    program = default_cache() / "lab" / f"nvml-{nvml.digest()}" / nvml.SMI
    if not program.is_file():
        pytest.skip(f"{program} is not there: run `make setup`")
    return program


@functools.cache
def library() -> Path:
    """The library by its version's name: compiled here where there is a compiler, as set-up made it elsewhere."""
    folder = Path(SCRATCH.name)
    target = folder / f"libnvidia-ml.so.{VERSION}"
    if compiler := shutil.which("cc"):
        flags = ["-std=gnu11", "-O1", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread"]
        words = [compiler, *flags, "-o", target, *sorted(nvml.FOLDER.glob("*.c"))]
        subprocess.run(words, check=True, timeout=120)
    else:
        shutil.copy(nvml.built(default_cache()) / nvml.LIBRARY, target)
    (folder / "libnvidia-ml.so.1").symlink_to(target.name)
    return target


class Node:
    def __init__(self, root: Path, board: str = "H100-SXM5-80GB", gpus: int = 2) -> None:
        self.root = root
        (root / "usr/bin").mkdir(parents=True)
        (root / "dev").mkdir()
        for package in recipes.driver(VERSION):
            for path, text in package.programs.items():
                (root / path).write_text(text)
        self.plug(gpus, board)

    def plug(self, gpus: int, board: str = "H100-SXM5-80GB") -> None:
        found = hardware(board, gpus) if gpus else json.dumps({"gpus": [], "switches": []})
        self.write("var/lib/gpuyard-lab/gpus.json", found)
        self.apply()

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def install_library(self, version: str) -> None:
        """As the package does: the file has the version's name, the link has the one that programs look for."""
        folder = self.root / recipes.LIBRARIES
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(library(), folder / f"libnvidia-ml.so.{version}")
        (folder / "libnvidia-ml.so.1").symlink_to(f"libnvidia-ml.so.{version}")

    def load(self, version: str) -> None:
        self.write("proc/driver/nvidia/version", LOADED.format(version))
        state = json.loads((self.root / "var/lib/gpuyard-lab/gpus.json").read_text())
        names = ["nvidiactl", *(f"nvidia{minor}" for minor, _ in enumerate(state["gpus"]))]
        for name in [*names, *(f"nvidia-nvswitch{number}" for number, _ in enumerate(state["switches"]))]:
            (self.root / "dev" / name).touch()

    def patch(self, **patch: Any) -> None:
        """Break it, or mend it with nothing."""
        self.write("var/lib/gpuyard-lab/faults.d/t.json", json.dumps({"patch": patch}))
        self.apply()

    def inject(self, **functions: int | str) -> None:
        self.patch(gpus={"0": {"nvml": {name.replace("every", "*"): code for name, code in functions.items()}}})

    def apply(self) -> None:
        words = [sys.executable, ROLE / "files/simulated_gpu.py", "apply"]
        done = subprocess.run(words, env=self.environment(), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr

    @property
    def state(self) -> dict[str, str]:
        lines = (self.root / "run/gpuyard-lab/gpus.state").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines[1:-1])

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "GPUYARD_LAB_ROOT": str(self.root),
            "LD_LIBRARY_PATH": str(self.root / recipes.LIBRARIES),
            "LC_ALL": "C",
        }

    def run(self, program: str | Path, *words: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """One of the node's programs, in Python, or another one's path."""
        command = [program] if isinstance(program, Path) else [sys.executable, self.root / "usr/bin" / program]
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, check=False, env=self.environment(), timeout=timeout
        )

    def smi(self, *words: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        return self.run(smi(), *words, timeout=timeout)


def on(folder: Path, board: str = "H100-SXM5-80GB") -> Node:
    """Eight GPUs of a board with their driver; linked by NVSwitches, where the board has NVLinks."""
    node = Node(folder, board, 8)
    node.install_library(VERSION)
    node.load(VERSION)
    return node


def use_library(node: Node, monkeypatch: pytest.MonkeyPatch) -> Any:
    """nvidia-ml-py on the library, in this process, with the node's folder as its machine."""
    import pynvml

    monkeypatch.setenv("GPUYARD_LAB_ROOT", str(node.root))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library())))
    pynvml._nvmlGetFunctionPointer_cache.clear()
    return pynvml
