"""Programs that the roles carry to nodes, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROLES = Path(__file__).parents[1] / "roles"


def program(path: str) -> ModuleType:
    """A program that a role carries to a node. `path` is below roles/."""
    file = ROLES / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
