"""Rules between the parts of a fleet.

They read plain data and skip what is not there or of the wrong kind (the models refuse that), so that a
file with several mistakes is told all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

Path = tuple[str | int, ...]

# Other keys are shown quoted: a key may hold what a terminal would obey.
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Each would undo something the service promises: keys belong to credentials, debug routes stay closed,
# devices are the node's affair, and code is never loaded from a message.
FORBIDDEN_ENV = {
    "VLLM_API_KEY": "the key comes from a credential, never from a spec",
    "HF_TOKEN": "nodes serve offline and a spec holds no secrets",
    "VLLM_SERVER_DEV_MODE": "debug routes stay closed",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "what is served is decided by the lock",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "messages must not carry code",
}
FORBIDDEN_ENV_PREFIXES = {
    "LD_": "the loader's variables could put other code into the service",
    "PYTHON": "Python's variables could put other code into the service",
    "AWS_": "a spec holds no secrets",
}


@dataclass(frozen=True, slots=True)
class Broken:
    """One rule that one place breaks."""

    rule: str
    path: Path
    given: str
    allowed: str

    @property
    def field(self) -> str:
        return field_name(self.path)


def field_name(path: Path) -> str:
    """`pools[0].name` for ("pools", 0, "name")."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _PLAIN.fullmatch(part):
            text += f"[{part[:60]!r}]"
        else:
            text += f".{part}" if text else part
    return text


def broken_rules(fleet: object) -> list[Broken]:
    """Every rule the fleet breaks, in the order of the file's parts."""
    root = _mapping(fleet)
    return [
        *_driver_is_not_said_twice(root),
        *_names_are_unique(root, "pools"),
        *_names_are_unique(root, "engines"),
        *_names_are_unique(root, "models"),
        *_no_pool_is_called_gateway(root),
        *_references_exist(root, "pool", "pools"),
        *_references_exist(root, "engine", "engines"),
        *_ports_are_unique_in_a_pool(root),
        *_models_fit_their_nodes(root),
        *_environment_is_harmless(root),
    ]


def _driver_is_not_said_twice(root: dict[str, object]) -> Iterator[Broken]:
    driver = _mapping(root.get("driver"))
    given = [key for key in ("branch", "version") if driver.get(key) is not None]
    if len(given) > 1:
        told = " and ".join(f"{key} {driver[key]!r}" for key in given)
        yield Broken("SPEC-DRIVER", ("driver",), told, "one of branch and version, or neither")


def _names_are_unique(root: dict[str, object], part: str) -> Iterator[Broken]:
    seen: dict[str, int] = {}
    for index, item in _items(root, part):
        name = item.get("name")
        if not isinstance(name, str):
            continue
        if name in seen:
            allowed = f"a name of its own; {part}[{seen[name]}] is called so already"
            yield Broken("SPEC-DUPLICATE-NAME", (part, index, "name"), repr(name), allowed)
        seen.setdefault(name, index)


def _no_pool_is_called_gateway(root: dict[str, object]) -> Iterator[Broken]:
    for index, pool in _items(root, "pools"):
        if pool.get("name") == "gateway":
            allowed = "any other name; gateway nodes are called <fleet>-gateway-<index>"
            yield Broken("SPEC-RESERVED-NAME", ("pools", index, "name"), "'gateway'", allowed)


def _references_exist(root: dict[str, object], field: str, part: str) -> Iterator[Broken]:
    known = list(dict.fromkeys(name for _, item in _items(root, part) if isinstance(name := item.get("name"), str)))
    for index, model in _items(root, "models"):
        wanted = model.get(field)
        if isinstance(wanted, str) and wanted not in known:
            yield Broken("SPEC-REFERENCE", ("models", index, field), repr(wanted), f"one of {part}: {', '.join(known)}")


def _ports_are_unique_in_a_pool(root: dict[str, object]) -> Iterator[Broken]:
    seen: dict[tuple[str, int], int] = {}
    for index, model in _items(root, "models"):
        pool, port = model.get("pool"), model.get("port")
        if not isinstance(pool, str) or not isinstance(port, int):
            continue
        if (pool, port) in seen:
            allowed = f"a port that no other model of pool {pool} has; models[{seen[pool, port]}] has {port}"
            yield Broken("SPEC-PORT", ("models", index, "port"), str(port), allowed)
        seen.setdefault((pool, port), index)


def _models_fit_their_nodes(root: dict[str, object]) -> Iterator[Broken]:
    gpus = {pool.get("name"): pool.get("gpus_per_node") for _, pool in _items(root, "pools")}
    for index, model in _items(root, "models"):
        flags = _mapping(model.get("vllm"))
        pool = model.get("pool")
        most = gpus.get(pool)
        taken = 1
        for flag in ("tensor_parallel_size", "data_parallel_size"):
            size = flags.get(flag)
            if isinstance(size, int) and isinstance(most, int) and taken * size > most:
                rest = f", of which each copy takes {taken}" if taken > 1 else ""
                allowed = f"at most {most // taken}: a node of pool {pool} has {most} GPUs{rest}"
                yield Broken("SPEC-GPUS", ("models", index, "vllm", flag), str(size), allowed)
            taken *= size if isinstance(size, int) else 1


def _environment_is_harmless(root: dict[str, object]) -> Iterator[Broken]:
    for index, model in _items(root, "models"):
        for name in _mapping(model.get("env")):
            why = FORBIDDEN_ENV.get(name) or next(
                (why for prefix, why in FORBIDDEN_ENV_PREFIXES.items() if name.startswith(prefix)), None
            )
            if why:
                yield Broken("SPEC-ENV", ("models", index, "env", name), repr(name), f"leave it out: {why}")


def _items(root: dict[str, object], part: str) -> Iterator[tuple[int, dict[str, object]]]:
    found = root.get(part)
    if isinstance(found, list):
        for index, item in enumerate(cast("list[object]", found)):
            if isinstance(item, dict):
                yield index, _mapping(cast("object", item))


def _mapping(value: object) -> dict[str, object]:
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}
