"""Write down what `pulumi preview --json` says of each fleet of AWS, so that a change of it shows in review.

    python tools/aws_previews.py [FLEET...]

The preview is of an empty stack on an emulated account. What differs from run to run is left out: times, ids, URNs of
providers. What is known only once it is made is named by what it is of. tests/emulated_aws/test_each_fleet.py compares.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.emulated_aws.fleet import FLEETS, emulated_fleet, moto_server
from tools.project import PROJECT

PREVIEWS = PROJECT / "tests/emulated_aws/previews"
_LATER = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
"""The engine's mark of a value that is known later."""


def normalised(planned: dict[str, Any]) -> str:
    """A preview as a text: the resources by name, each with its inputs."""
    found: dict[str, Any] = {}
    for step in planned["steps"]:
        state = step.get("newState") or step["oldState"]
        if state["type"].startswith("pulumi:"):
            continue
        depends = state.get("propertyDependencies") or {}
        inputs = {key: _named(value, depends.get(key) or ()) for key, value in (state.get("inputs") or {}).items()}
        own = {"type": state["type"], "op": step["op"], "of": _name(state.get("parent", ""))}
        options = {key: state[key] for key in ("ignoreChanges", "protect") if state.get(key)}
        found[_name(step["urn"])] = {**own, **inputs, **options}
    return yaml.safe_dump(found, default_flow_style=None, width=1000)


def _name(urn: str) -> str:
    return urn.rsplit("::", 1)[-1]


def _named(value: Any, depends: list[str]) -> Any:
    """The value, with the names of what it is of in the place of what is known later."""
    match value:
        case dict():
            return {key: _named(item, depends) for key, item in value.items()}
        case list():
            return [_named(item, depends) for item in value]
        case str() if value == _LATER:
            return f"<{' '.join(sorted(map(_name, depends)))}>"
        case _:
            return value


def main() -> int:
    PREVIEWS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FLEETS:
        with tempfile.TemporaryDirectory(prefix="aws-previews-") as folder, moto_server(Path(folder)) as endpoint:
            text = normalised(emulated_fleet(Path(folder), name, endpoint).planned())
        path = PREVIEWS / f"{name}.yaml"
        changed = not path.is_file() or path.read_text() != text
        path.write_text(text)
        print(f"{path.relative_to(PROJECT)}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
