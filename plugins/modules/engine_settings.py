#!/usr/bin/python
"""The settings of a node's engines: read, kept, put back."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.engine_settings import (
    SettingsError,
    engines,
    keep,
    refuse_other_models,
    restore,
)

DOCUMENTATION = r"""
module: engine_settings
short_description: Keep the settings of a node's engines, and put them back
description:
  - Settings, keys and units of all engines as one set. C(kept) copies it aside, C(restored) brings exactly that set
    back, C(read) only tells what the node runs.
  - Refuses a node that serves other models, from other weights or on other ports, than those that are asked for.
options:
  state:
    description: What is to be done.
    type: str
    choices: [read, kept, restored]
    required: true
  models:
    description: What is to be served, each with C(name), C(path) and C(port). Left out, nothing is compared.
    type: list
    elements: dict
    default: []
author: [gpuyard]
attributes:
  check_mode: {support: none, description: Nothing is done in a check run but reading.}
"""

EXAMPLES = r"""
- name: Keep what the engines run on
  gpuyard.fleet.engine_settings: {state: kept}
"""

RETURN = r"""
environments:
  description: The engine's environment of each model that the node serves.
  returned: success
  type: dict
files:
  description: Files that were put back or taken away.
  returned: with C(restored)
  type: list
  elements: str
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["read", "kept", "restored"], "required": True},
            "models": {"type": "list", "elements": "dict", "default": []},
        },
        supports_check_mode=True,
    )
    state = module.params["state"]
    root = Path("/")
    changed, restored = False, []
    try:
        if state == "kept" and not module.check_mode:
            changed = keep(root)
        elif state == "restored" and not module.check_mode:
            restored = restore(root)
            changed = bool(restored)
        found = engines(root)
        if module.params["models"]:
            refuse_other_models(found, module.params["models"])
        environments = {name: told["environment"] for name, told in found.items()}
        module.exit_json(changed=changed, environments=environments, files=restored)
    except SettingsError as refused:
        module.fail_json(msg=str(refused))


if __name__ == "__main__":
    main()
