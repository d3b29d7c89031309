"""What all tests share."""

from __future__ import annotations

import sys

import plugins.module_utils.kept_note

# On a node, Ansible packs a module with what it imports under this name. Here nothing is packed, so the name is given.
for _module in (plugins.module_utils, plugins.module_utils.kept_note):
    sys.modules[f"ansible_collections.gpuyard.fleet.{_module.__name__}"] = _module
