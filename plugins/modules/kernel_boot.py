#!/usr/bin/python
"""Which kernel a machine boots: read, tried once, kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.kernel_change import (
    SAVED,
    SETTINGS,
    SETTINGS_TEXT,
    boots,
    entries,
    environment,
    fell_back,
)

DOCUMENTATION = r"""
module: kernel_boot
short_description: Have a machine boot a kernel once, or from now on
description:
  - C(default) has GRUB boot a kernel from now on, whatever newer ones come, and ends a trial. C(once) has it boot one
    the next time alone and writes down that it is tried. C(heard) says that the kernel on trial was reached. C(read)
    only tells.
options:
  state:
    description: What is to be done.
    type: str
    choices: [read, default, once, heard]
    required: true
  release:
    description: The kernel, as C(uname -r) says it.
    type: str
author: [gpuyard]
attributes:
  check_mode: {support: full, description: Says whether something would change.}
"""

EXAMPLES = r"""
- name: Try the new kernel for one boot
  gpuyard.fleet.kernel_boot: {state: once, release: 6.1.0-57-amd64}
"""

RETURN = r"""
running:
  description: The kernel that runs.
  returned: success
  type: str
packages:
  description: Image and headers of the kernel that runs, each with its version; empty where dpkg knows none.
  returned: success
  type: dict
held:
  description: Those of them that somebody else holds. What a change of before has brought, it holds.
  returned: success
  type: list
  elements: str
container:
  description: Whether the kernel is a host's.
  returned: success
  type: bool
fell_back:
  description: Whether a kernel was tried and did not stay up.
  returned: success
  type: bool
boots:
  description: What GRUB boots C(once), the next time, and by C(default); null where its menu decides.
  returned: success
  type: dict
"""

GRUB = Path("/boot/grub")
TRIAL = Path("/var/lib/gpuyard/kernel-trial")
KEPT = Path("/var/lib/gpuyard/kernels")
# The node's own timer leaves it, when it goes back because nobody came.
UNHEARD = TRIAL.with_name("kernel-trial.unheard")
BOOT = Path("/proc/sys/kernel/random/boot_id")


class RefusedError(Exception):
    """What was found, why it is refused, the smallest change that would pass."""


class Machine:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.running = os.uname().release
        self.boot = BOOT.read_text().strip()

    def ask(self, *words: str) -> str:
        return self.module.run_command(list(words), check_rc=True, environ_update={"LC_ALL": "C"})[1]

    @property
    def config(self) -> str:
        return text_of(GRUB / "grub.cfg") or ""

    @property
    def variables(self) -> dict[str, str]:
        return environment(text_of(GRUB / "grubenv") or "")

    @property
    def trial(self) -> Optional[dict[str, Any]]:
        text = text_of(TRIAL)
        if text is None:
            return None
        release, boot = text.split()
        return {"release": release, "boot": boot, "unheard": UNHEARD.exists()}

    def own(self) -> dict[str, Any]:
        """Packages of the running kernel."""
        names = [f"linux-{part}-{self.running}" for part in ("image", "headers")]
        shown = self.module.run_command(
            ["dpkg-query", "--show", "--showformat=${Package}\t${Version}\t${db:Status-Want}\n", *names]
        )[1]
        rows = [line.split("\t") for line in shown.splitlines()]
        ours = (KEPT / self.running).is_dir()
        return {
            "packages": {name: version for name, version, _ in rows if version},
            "held": sorted(name for name, version, want in rows if version and want == "hold" and not ours),
        }

    def settle(self) -> bool:
        """Have GRUB boot what is saved. Says whether that is a change."""
        path = Path(SETTINGS)
        if text_of(path) == SETTINGS_TEXT and SAVED in self.config:
            return False
        if not self.module.check_mode:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, SETTINGS_TEXT)
            self.ask("update-grub")
        return True

    def entry(self, release: str) -> str:
        if release not in entries(self.config):
            raise RefusedError(
                f"KERNEL-ENTRY: GRUB's menu has no entry of kernel {release}. Install its image, or run `update-grub` "
                "where it is installed"
            )
        return entries(self.config)[release]

    def default(self, release: str) -> bool:
        wanted = self.entry(release)
        # First the choice, then the menu that takes it: at no moment another one would boot.
        changed = self.variables.get("saved_entry") != wanted
        if changed:
            self.do("grub-set-default", wanted)
        changed = self.settle() or changed
        if self.variables.get("next_entry"):
            changed = True
            self.do("grub-editenv", str(GRUB / "grubenv"), "unset", "next_entry")
        for path in (TRIAL, UNHEARD):
            changed = changed or path.exists()
            if not self.module.check_mode:
                path.unlink(missing_ok=True)
        return changed

    def once(self, release: str) -> bool:
        if SAVED not in self.config or boots(self.config, self.variables)["default"] in (None, release):
            raise RefusedError(
                f"KERNEL-ONCE: kernel {release} is to be tried for one boot, and GRUB has no other one to fall back "
                "to. Make the running kernel its default first (state: default)"
            )
        self.do("grub-reboot", self.entry(release))
        if not self.module.check_mode:
            UNHEARD.unlink(missing_ok=True)
            replace(TRIAL, f"{release}\n{self.boot}\n")
        return True

    def heard(self, release: str) -> bool:
        if self.running != release or not TRIAL.exists():
            return False
        if not self.module.check_mode:
            TRIAL.unlink()
        return True

    def do(self, *words: str) -> None:
        if not self.module.check_mode:
            self.ask(*words)
            # GRUB reads the disk, and no journal of a file system.
            self.ask("sync", str(GRUB / "grubenv"))

    def told(self) -> dict[str, Any]:
        container = self.module.run_command(["systemd-detect-virt", "--container", "--quiet"])[0] == 0
        return {
            "running": self.running,
            "container": container,
            "fell_back": fell_back(self.trial, self.boot, self.running),
            "boots": boots(self.config, self.variables),
            **self.own(),
        }


def text_of(path: Path) -> Optional[str]:
    try:
        return path.read_text()
    except OSError:
        return None


def replace(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    half = path.with_name(f".{path.name}.half")
    with half.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["read", "default", "once", "heard"], "required": True},
            "release": {"type": "str"},
        },
        required_if=[("state", state, ["release"]) for state in ("default", "once", "heard")],
        supports_check_mode=True,
    )
    machine = Machine(module)
    acts = {"default": machine.default, "once": machine.once, "heard": machine.heard}
    try:
        state = module.params["state"]
        changed = acts[state](module.params["release"]) if state in acts else False
    except RefusedError as refused:
        module.fail_json(msg=str(refused))
    module.exit_json(changed=changed, **machine.told())


if __name__ == "__main__":
    main()
