"""The command `gpuyard`: parse, call, print. Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, override

import typer
from typer.core import TyperGroup

from gpuyard.cli.refusals import tell
from gpuyard.spec.errors import RefusedError

MODULES: Mapping[str, Sequence[str]] = {
    "init": ("init",),
    "plan": ("check", "lock", "sbom", "compat", "explain", "gpus", "drivers", "engines"),
    "sizing": ("plan",),
    "drift": ("drift",),
    "hosts": ("hosts",),
    "guard": ("guard",),
    "rehearse": ("rehearse",),
    "fit": ("fit",),
    "schema": ("schema",),
    "faults": ("lab",),  # the lab's commands and those that break it
    "bench": ("bench",),
    "upgrade": ("upgrade", "runs"),
}
"""The modules of this package, and the commands that `register` of each adds, as they are listed."""


class Commands(TyperGroup):
    """Each command's module is imported when the command is asked for: all of them take a second."""

    @override
    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in MODULES.values() for name in names]

    @override
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            # One that is unknown is held against all others, for one that was meant.
            for module in [module for module, names in MODULES.items() if cmd_name in names] or MODULES:
                self.commands.update(commands_of(module))
        return self.commands.get(cmd_name)


def commands_of(module: str) -> Mapping[str, Any]:
    """The commands that a module of this package adds, by their names. It is imported for that."""
    registered = typer.Typer()
    import_module(f"gpuyard.cli.{module}").register(registered)
    return typer.main.get_group(registered).commands


app = typer.Typer(
    name="gpuyard", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def gpuyard() -> None:
    """Run your own LLMs on your own GPU machines."""


def main() -> None:
    try:
        app()
    except RefusedError as refused:
        sys.exit(tell(refused, as_json=False))
