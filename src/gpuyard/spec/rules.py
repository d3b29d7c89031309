"""Rules between the parts of a fleet.

They read plain data and skip what is not there or of the wrong kind (the models refuse that), so that a
file with several mistakes is told all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from gpuyard.spec.networks import too_wide

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
        *_infiniband_is_for_hosts(root),
        *_aws_is_for_aws(root),
        *_zones_are_of_the_region(root),
        *_one_region(root),
        *_the_network_is_said_once(root),
        *_the_bastion_is_named(root),
        *_placement_goes_with_the_purchase(root),
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


def _infiniband_is_for_hosts(root: dict[str, object]) -> Iterator[Broken]:
    for index, pool in _items(root, "pools"):
        if pool.get("infiniband") is None:
            continue
        path: Path = ("pools", index, "infiniband")
        if pool.get("efa") is not None:
            yield Broken("SPEC-FABRIC", path, "infiniband beside efa", "one network between the nodes")
        elif root.get("provider") != "hosts":
            yield Broken("SPEC-FABRIC", path, f"infiniband with provider {root.get('provider')}", "provider hosts")


def _aws_is_for_aws(root: dict[str, object]) -> Iterator[Broken]:
    if root.get("aws") is not None and root.get("provider") != "aws":
        yield Broken("SPEC-AWS-PROVIDER", ("aws",), "settings of AWS", "leave them out, or set provider to aws")


def _zones_are_of_the_region(root: dict[str, object]) -> Iterator[Broken]:
    aws = _mapping(root.get("aws"))
    region, zones = aws.get("region"), aws.get("zones")
    if not isinstance(region, str) or not isinstance(zones, list):
        return
    places: list[tuple[Path, object, bool]] = [
        (("aws", "zones", n), zone, False) for n, zone in enumerate(cast("list[object]", zones))
    ]
    for index, pool in _items(root, "pools"):
        own = _mapping(pool.get("aws")).get("zones")
        for n, zone in enumerate(cast("list[object]", own) if isinstance(own, list) else []):
            places.append((("pools", index, "aws", "zones", n), zone, True))
    if lustre := _mapping(aws.get("lustre")):
        places.append((("aws", "lustre", "zone"), lustre.get("zone"), True))
    for path, zone, of_fleet in places:
        if isinstance(zone, str) and zone[:-1] != region:
            allowed = f"a zone of region {region}, e.g. {region}{zone[-1:]}"
            yield Broken("SPEC-AWS-ZONE", path, repr(zone), allowed)
        elif of_fleet and isinstance(zone, str) and zone not in zones:
            allowed = f"one of aws.zones: {', '.join(map(str, cast('list[object]', zones)))}"
            yield Broken("SPEC-AWS-ZONE", path, repr(zone), allowed)


def _one_region(root: dict[str, object]) -> Iterator[Broken]:
    region = _mapping(root.get("aws")).get("region")
    places: list[tuple[Path, object]] = [(("planning", "region"), _mapping(root.get("planning")).get("region"))]
    for index, pool in _items(root, "pools"):
        places.append((("pools", index, "machine", "region"), _mapping(pool.get("machine")).get("region")))
    for path, other in places:
        if isinstance(region, str) and isinstance(other, str) and other != region:
            yield Broken("SPEC-AWS-REGION", path, repr(other), f"{region}, as aws.region; or left out")


def _the_network_is_said_once(root: dict[str, object]) -> Iterator[Broken]:
    aws = _mapping(root.get("aws"))
    network = _mapping(aws.get("network"))
    if not network:
        return
    if (network.get("cidr") is None) == (network.get("vpc") is None):
        given = "both cidr and vpc" if network.get("vpc") else "neither cidr nor vpc"
        yield Broken("SPEC-AWS-NETWORK", ("aws", "network"), given, "cidr for a new VPC, or vpc for one that is there")
    elif network.get("vpc") is not None:
        zones, subnets = aws.get("zones"), _mapping(network.get("subnets"))
        missing = [z for z in cast("list[object]", zones if isinstance(zones, list) else []) if z not in subnets]
        if missing:
            allowed = f"the private subnet of {', '.join(map(str, missing))} too"
            yield Broken("SPEC-AWS-NETWORK", ("aws", "network", "subnets"), f"{len(subnets)} subnets", allowed)
    yield from _endpoints_are_said_once(network)


def _endpoints_are_said_once(network: dict[str, object]) -> Iterator[Broken]:
    made, path = network.get("make_endpoints"), ("aws", "network", "make_endpoints")
    made = cast("list[object]", made if isinstance(made, list) else [])
    given = network.get("s3_endpoint")
    if network.get("vpc") is None and (made or given):
        said = "make_endpoints" if made else "s3_endpoint"
        yield Broken("SPEC-AWS-NETWORK", (*path[:2], said), "given with cidr", "left out: a new VPC gets its own")
    elif "s3" in made and given:
        yield Broken("SPEC-AWS-NETWORK", path, "s3 beside s3_endpoint", "one of both: it is there, or it is made")
    elif "s3" in made and not network.get("route_tables"):
        path = ("aws", "network", "route_tables")
        yield Broken("SPEC-AWS-NETWORK", path, "none, with make_endpoints s3", "those of the private subnets")


def _the_bastion_is_named(root: dict[str, object]) -> Iterator[Broken]:
    access = _mapping(_mapping(root.get("aws")).get("access"))
    method, path = access.get("method", "ssm"), ("aws", "access", "bastion")
    if method == "bastion" and access.get("bastion") is None:
        yield Broken("SPEC-AWS-ACCESS", path, "nothing", "user@host of the bastion")
    if method not in ("bastion", "ssh"):
        return
    path, given = ("aws", "access", "sources"), access.get("sources")
    sources = [it for it in cast("list[object]", given) if isinstance(it, str)] if isinstance(given, list) else []
    if not given:
        yield Broken("SPEC-AWS-ACCESS", path, "nothing", f"the addresses that SSH is open to with method {method}")
    elif wide := too_wide(sources):
        who = "the bastion's address" if method == "bastion" else "the operators' addresses"
        allowed = f"{who}, e.g. 203.0.113.7/32: SSH is open to no network wider than a /8"
        yield Broken("SPEC-AWS-ACCESS", path, wide, allowed)


def _placement_goes_with_the_purchase(root: dict[str, object]) -> Iterator[Broken]:
    for index, pool in _items(root, "pools"):
        aws, purchase = _mapping(pool.get("aws")), _mapping(pool.get("machine")).get("purchase")
        path: Path = ("pools", index, "aws")
        if purchase == "capacity-block" and aws.get("placement_group"):
            allowed = "false, or left out: a Capacity Block's machines stand together by themselves, and a group fails"
            yield Broken("SPEC-AWS-PLACEMENT", (*path, "placement_group"), "true with a Capacity Block", allowed)
        if purchase == "capacity-block" and root.get("aws") is not None and aws.get("reservation") is None:
            yield Broken("SPEC-AWS-RESERVATION", path, "no reservation", "reservation: the id of the Capacity Block")
        if purchase == "capacity-block" and root.get("aws") is not None and aws.get("block_ends") is None:
            allowed = "block_ends: its end, as `aws ec2 describe-capacity-reservations` tells it"
            yield Broken("SPEC-AWS-BLOCK-END", path, "no end of the Capacity Block", allowed)
        if purchase != "capacity-block" and aws.get("block_ends") is not None:
            allowed = "left out: only what is bought as a capacity-block ends with one"
            yield Broken("SPEC-AWS-BLOCK-END", (*path, "block_ends"), str(aws["block_ends"]), allowed)
        if purchase == "spot" and aws.get("reservation") is not None:
            allowed = "left out: a spot machine runs in no reservation"
            yield Broken("SPEC-AWS-RESERVATION", (*path, "reservation"), str(aws["reservation"]), allowed)


def _items(root: dict[str, object], part: str) -> Iterator[tuple[int, dict[str, object]]]:
    found = root.get(part)
    if isinstance(found, list):
        for index, item in enumerate(cast("list[object]", found)):
            if isinstance(item, dict):
                yield index, _mapping(cast("object", item))


def _mapping(value: object) -> dict[str, object]:
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}
