"""What tests of serving share: a stored model, a store, rendered templates."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

PROJECT = Path(__file__).parents[2]

# On a node, Ansible packs a module with what it imports under this name. Here nothing is packed, so the name is given,
# in the order in which they import one another.
for _name in (
    "engine_inputs",
    "shared_storage",
    "model_verify",
    "model_source",
    "model_room",
    "model_ahead",
    "model_watched",
    "model_shared",
):
    _module = importlib.import_module(f"plugins.module_utils.{_name}")
    sys.modules[f"ansible_collections.gpuyard.fleet.{_module.__name__}"] = _module


MODEL_FILES = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "text_config": {"layers": 2}}),
    "model-00001-of-00002.safetensors": "one" * 1000,
    "model-00002-of-00002.safetensors": "two" * 1000,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ),
    "tokenizer/tokenizer.json": "{}",
}


def manifest_of(folder: Path) -> str:
    """The manifest of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MANIFEST.sha256")
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n" for path in files
    )


def write_model(folder: Path, files: dict[str, str]) -> str:
    """Write files and their manifest; returns the manifest's SHA-256."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "MANIFEST.sha256").write_text(manifest_of(folder))
    return hashlib.sha256((folder / "MANIFEST.sha256").read_bytes()).hexdigest()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A model as it lies on a node."""
    digest = write_model(tmp_path / "draft", MODEL_FILES)
    return (tmp_path / "draft").rename(tmp_path / digest[:12])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without writing to the terminal."""

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are silent."""


class Store:
    """A store of models, real HTTP on the loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        handler = functools.partial(QuietHandler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, name: str, files: dict[str, str]) -> str:
        return write_model(self.folder / name, files)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    folder = tmp_path / "store"
    folder.mkdir()
    running = Store(folder)
    yield running
    running.server.shutdown()
    running.server.server_close()


def render(folder: Path, role: str, names: dict[str, str], variables: dict[str, Any]) -> None:
    """Render templates of a role as Ansible does, with the role's own defaults and variables below those given.

    What is given is data, as what an inventory plugin gives: braces in it are never a template.
    """
    home = PROJECT / "roles" / role
    loader = DataLoader()
    known: dict[str, Any] = {"ansible_managed": "Ansible managed", "role_path": str(home)}
    for kind in ("defaults", "vars"):
        known.update(loader.load_from_file(str(home / f"{kind}/main.yml"), trusted_as_template=True))
    templar = Templar(loader, variables={**known, **variables})
    folder.mkdir(parents=True, exist_ok=True)
    for target, template in names.items():
        source = trust_as_template((home / "templates" / template).read_text())
        text = templar.template(source, escape_backslashes=False, overrides={"trim_blocks": True})
        (folder / target).write_text(text)
