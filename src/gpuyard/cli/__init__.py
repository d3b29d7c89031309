"""The command `gpuyard`: parse, call, print. Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

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

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        return [name for names in MODULES.values() for name in names]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        # One that is unknown is held against all others, for one that was meant.
        for module in [module for module, names in MODULES.items() if cmd_name in names] or MODULES:
            registered = typer.Typer()
            import_module(f"gpuyard.cli.{module}").register(registered)
            self.commands.update(typer.main.get_group(registered).commands)
        return self.commands.get(cmd_name)


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
