"""What must not come of a `pulumi up`. Rules read plain data, and a value that is known later only is no finding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from gpuyard.guard import Resource, changed
from gpuyard.spec.networks import too_wide

NODES = ("aws:ec2/instance:Instance",)
RESERVATIONS = (
    "aws:ec2/capacityReservation:CapacityReservation",
    "aws:ec2/capacityBlockReservation:CapacityBlockReservation",
)
TEMPLATES = ("aws:ec2/launchTemplate:LaunchTemplate",)
GROUPS = ("aws:ec2/securityGroup:SecurityGroup", "aws:ec2/defaultSecurityGroup:DefaultSecurityGroup")
POLICIES = tuple(
    f"aws:iam/{name}"
    for name in ("policy:Policy", "rolePolicy:RolePolicy", "userPolicy:UserPolicy", "groupPolicy:GroupPolicy")
)
BUCKETS = ("aws:s3/bucket:Bucket", "aws:s3/bucketV2:BucketV2")
BLOCKS = ("aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock",)
ROOTS = ("/dev/xvda", "/dev/sda1")
"""What images call their root volume, as EC2 documents it."""
NARROWING = frozenset(
    f"aws:{name}"
    for name in (
        "sourcevpce",
        "sourcevpc",
        "sourceaccount",
        "sourcearn",
        "principalorgid",
        "principalaccount",
        "principalarn",
    )
)
"""Keys of a condition that say who, in small letters: AWS takes them in any. Others everybody can fulfil, as TLS."""
# An operator that holds only where the key is there: IfExists and ForAllValues let a request through that has none.
_NARROWS = re.compile(r"(?i)(ForAnyValue:)?(String(Equals(IgnoreCase)?|Like)|Arn(Equals|Like))")
# AWS's own policies are AWS's to widen; these are wide by their name. AmazonSSMManagedInstanceCore is none of them.
_WIDE_POLICY = re.compile(r"arn:aws[a-z-]*:iam::aws:policy/(.*/)?[^/]*(Administrator|PowerUser|FullAccess)[^/]*")
_SECRET = "4dabf18193072939515e22adb298388d"  # noqa: S105 - the engine's mark of a value that it does not show


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the operator says of this run."""

    gateway_port: int = 8080
    """The one port that the world may reach."""
    drained: frozenset[str] = frozenset()
    """Nodes that serve nothing any more."""
    released: frozenset[str] = frozenset()
    """Reservations that are given up on purpose."""
    usd_per_hour: float | None = None
    """What the plan says that the machines cost; None: not compared."""
    price: Callable[[str, str], float | None] = field(default=lambda _instance, _purchase: None)
    """USD an hour of an instance type bought in a way (on-demand, spot); None where nobody says."""
    forces_replacement: Callable[[str, str], bool] = field(default=lambda _type, _property: False)
    """Whether the SDK's documentation says that another value of a property makes another resource."""


@dataclass(frozen=True, slots=True)
class GuardFinding:
    """One thing that would be lost, opened or spent."""

    rule: str
    resource: str
    found: str
    why: str
    change: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.resource}: {self.found}: {self.why}; {self.change}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


Rule = Callable[[Resource, Allowed], Iterator[GuardFinding]]


def findings(resources: Sequence[Resource], allowed: Allowed) -> list[GuardFinding]:
    """Everything that the rules say, in the order of the resources; what concerns all of them comes last."""
    found = [
        finding
        for resource in resources
        for rule in (RULES if resource.act == "delete" else (*RULES, *OPENINGS))
        for finding in rule(resource, allowed)
    ]
    together = (
        _machines_of_templates_elsewhere(resources),
        _buckets_without_a_block(resources),
        _cost(resources, allowed),
    )
    return [*found, *(finding for findings_of in together for finding in findings_of)]


# --- what a change would lose --------------------------------------------------------------------------------------


def nodes_that_serve(resource: Resource, allowed: Allowed) -> Iterator[GuardFinding]:
    if resource.type not in NODES or resource.name in allowed.drained:
        return
    if loss := _loss(resource, allowed):
        why = "it serves, and its requests, its disks and, where capacity is scarce, its place would be lost"
        change = (
            f"drain it first: ansible-playbook playbooks/operate/drain_node.yml --limit {resource.name}, then "
            f"--drained {resource.name}; or leave what forces it as it is"
        )
        yield GuardFinding("GUARD-NODE", resource.name, loss, why, change)


def reservations(resource: Resource, allowed: Allowed) -> Iterator[GuardFinding]:
    if resource.type not in RESERVATIONS or resource.name in allowed.released:
        return
    if loss := _loss(resource, allowed):
        why = "capacity that is given back may not be had again, and a block is paid for"
        yield GuardFinding("GUARD-RESERVATION", resource.name, loss, why, f"keep it, or --release {resource.name}")


def _loss(resource: Resource, allowed: Allowed) -> str:
    if resource.act == "delete":
        return "would be deleted"
    if resource.act == "replace":
        reasons = f", because of {', '.join(resource.because)}" if resource.because else ""
        return f"would be replaced{reasons}"
    if resource.act == "update":
        forcing = [key for key in changed(resource) if allowed.forces_replacement(resource.type, key)]
        if forcing:
            return f"would be replaced, because of {', '.join(forcing)} (the SDK says so)"
    return ""


# --- what is open --------------------------------------------------------------------------------------------------


def open_groups(resource: Resource, allowed: Allowed) -> Iterator[GuardFinding]:
    rules: list[Mapping[str, Any]] = []
    match resource.type:
        case kind if kind in GROUPS:
            rules = list(_mappings(resource.inputs.get("ingress")))
        case "aws:ec2/securityGroupRule:SecurityGroupRule" if resource.inputs.get("type") == "ingress":
            rules = [resource.inputs]
        case "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule":
            rules = [resource.inputs]
        case _:
            pass
    by_port: dict[tuple[str, object, object], list[str]] = {}
    for rule in rules:
        sources = [*_texts(rule.get("cidrBlocks")), *_texts(rule.get("ipv6CidrBlocks"))]
        sources += [rule[key] for key in ("cidrIpv4", "cidrIpv6") if isinstance(rule.get(key), str)]
        first, last = rule.get("fromPort"), rule.get("toPort")
        protocol = str(rule.get("protocol", rule.get("ipProtocol")))
        if first == last == allowed.gateway_port and protocol in ("tcp", "6"):
            continue
        by_port.setdefault((protocol, first, last), []).extend(sources)
    for (protocol, first, last), sources in by_port.items():
        if world := too_wide(sources):
            ports = "every port" if protocol == "-1" else f"{protocol} {first}-{last}"
            why = f"the world may reach the gateway's port {allowed.gateway_port} and nothing else"
            change = "name the networks that may, or the group itself (self)"
            yield GuardFinding("GUARD-OPEN-GROUP", resource.name, f"{ports} from {world}", why, change)


def metadata_service(resource: Resource, _allowed: Allowed) -> Iterator[GuardFinding]:
    of_template = resource.type in TEMPLATES
    # A machine made from a template has the template's options unless it says its own.
    of_machine = resource.type in NODES and not (
        resource.inputs.get("launchTemplate") and "metadataOptions" not in resource.inputs
    )
    if not (of_template or of_machine):
        return
    options = resource.inputs.get("metadataOptions")
    if _later(options):
        return
    told: Mapping[str, Any] = cast("Mapping[str, Any]", options) if isinstance(options, Mapping) else {}
    if told.get("httpEndpoint") == "disabled" or told.get("httpTokens") == "required" or _later(told.get("httpTokens")):
        return
    found = f"httpTokens is {told.get('httpTokens', 'not set')}"
    why = "with IMDSv1 whoever can make an engine fetch an address gets the machine's credentials"
    yield GuardFinding("GUARD-IMDS", resource.name, found, why, "set metadataOptions: {httpTokens: required}")


def volumes(resource: Resource, _allowed: Allowed) -> Iterator[GuardFinding]:
    blocks: list[tuple[str, object]] = []
    inputs = resource.inputs
    match resource.type:
        case "aws:ebs/volume:Volume" | "aws:efs/fileSystem:FileSystem":
            blocks = [("", inputs.get("encrypted"))]
        case kind if kind in TEMPLATES:
            devices = inputs.get("blockDeviceMappings")
            named: list[object] = []
            for mapping in _mappings(devices):
                ebs = mapping.get("ebs")
                if isinstance(ebs, Mapping):
                    its = cast("Mapping[str, Any]", ebs)
                    named.append(mapping.get("deviceName"))
                    blocks.append((f" {mapping.get('deviceName', '')}", its.get("encrypted")))
            # What a template does not say, the image does: mostly a volume in the clear.
            if not _later(devices) and not any(name in ROOTS or _later(name) for name in named):
                blocks.append((f" root ({' or '.join(ROOTS)})", None))
        case kind if kind in NODES:
            root = inputs.get("rootBlockDevice")
            for device in [*_mappings([root]), *_mappings(inputs.get("ebsBlockDevices"))]:
                blocks.append((f" {device.get('deviceName', 'root')}", device.get("encrypted")))
            if root is None and not inputs.get("launchTemplate"):
                blocks.append((" root", None))
        case _:
            pass
    for name, encrypted in blocks:
        # A launch template takes the word for the value.
        if encrypted not in (True, "true") and not _later(encrypted):
            why = "who gets hold of a snapshot reads models, logs and keys"
            yield GuardFinding("GUARD-UNENCRYPTED", resource.name, f"volume{name} is not", why, "set encrypted: true")


def wildcard_rights(resource: Resource, _allowed: Allowed) -> Iterator[GuardFinding]:
    why = "a machine that is taken over could do all that with it"
    documents: list[tuple[str, object]] = []
    if resource.type in POLICIES:
        documents = [("policy", resource.inputs.get("policy"))]
    elif resource.type == "aws:iam/role:Role":
        documents = [("trust policy", resource.inputs.get("assumeRolePolicy"))]
        for inline in _mappings(resource.inputs.get("inlinePolicies")):
            documents.append((f"inline policy {inline.get('name', '')}", inline.get("policy")))
    for where, document in documents:
        for statement in _statements(document):
            if statement.get("Effect") != "Allow":
                continue
            actions, names = _texts(statement.get("Action")), _texts(statement.get("Resource"))
            wild = [f"action {action}" for action in actions if "*" in action or "?" in action]
            wild += [f"resource {name}" for name in names if _every(name)]
            wild += ["every action but some"] if "NotAction" in statement else []
            wild += ["every resource but some"] if "NotResource" in statement else []
            wild += ["principal *"] if _anybody_may(statement) else []
            if wild:
                change = "name the actions and the resources, or whom to trust"
                yield GuardFinding("GUARD-WILDCARD-IAM", resource.name, f"{where}: {', '.join(wild)}", why, change)
    if resource.type.startswith("aws:iam/"):
        keys = ("policyArn", "policyArns", "managedPolicyArns")
        for arn in [arn for key in keys for arn in _texts(resource.inputs.get(key)) if _WIDE_POLICY.fullmatch(arn)]:
            change = "write a policy of your own that names the actions and the resources"
            yield GuardFinding("GUARD-WILDCARD-IAM", resource.name, f"AWS's policy {arn}", why, change)


def public_buckets(resource: Resource, _allowed: Allowed) -> Iterator[GuardFinding]:
    why = "models and their manifests would be the world's to read, or to change"
    acl = resource.inputs.get("acl")
    anybody = isinstance(acl, str) and (acl.startswith("public") or acl == "authenticated-read")
    if resource.type.startswith("aws:s3/bucket") and anybody:
        yield GuardFinding("GUARD-PUBLIC-BUCKET", resource.name, f"its ACL is {acl}", why, "set acl: private")
    if resource.type in BLOCKS:
        four = ("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets")
        off = [key for key in four if resource.inputs.get(key) is not True and not _later(resource.inputs.get(key))]
        if off:
            found = f"{', '.join(off)} not set"
            yield GuardFinding("GUARD-PUBLIC-BUCKET", resource.name, found, why, "set all four to true")
    if resource.type in ("aws:s3/bucketPolicy:BucketPolicy", *BUCKETS):
        for statement in _statements(resource.inputs.get("policy")):
            if statement.get("Effect") == "Allow" and _anybody_may(statement):
                change = "name the role, or the endpoint that requests come through (aws:sourceVpce)"
                yield GuardFinding("GUARD-PUBLIC-BUCKET", resource.name, "its policy lets everybody in", why, change)


RULES: tuple[Rule, ...] = (nodes_that_serve, reservations)
OPENINGS: tuple[Rule, ...] = (open_groups, metadata_service, volumes, wildcard_rights, public_buckets)
"""Of what stays or comes: what goes opens nothing any more."""


# --- all of them together ------------------------------------------------------------------------------------------


def _machines_of_templates_elsewhere(resources: Sequence[Resource]) -> Iterator[GuardFinding]:
    """A template that is in the file is judged there; one that nobody shows says nothing, and so the machine has to."""
    here = {it.urn for it in resources if it.type in TEMPLATES}
    for machine in resources:
        template = machine.inputs.get("launchTemplate")
        if machine.type not in NODES or machine.act == "delete" or not isinstance(template, Mapping):
            continue
        its = cast("Mapping[str, Any]", template)
        named = its.get("id") or its.get("name")
        if here.intersection(machine.made_of) or _later(its) or _later(named):
            continue
        found, change = f"its template {named} is not here", "or make the template in this stack"
        if machine.inputs.get("metadataOptions") is None:
            why = "whether it lets IMDSv1 answer is not to be seen"
            told = f"set metadataOptions: {{httpTokens: required}}, {change}"
            yield GuardFinding("GUARD-IMDS", machine.name, found, why, told)
        if machine.inputs.get("rootBlockDevice") is None:
            why = "what it says of its volumes is not to be seen, and an image's own are mostly in the clear"
            told = f"set rootBlockDevice: {{encrypted: true}}, {change}"
            yield GuardFinding("GUARD-UNENCRYPTED", machine.name, found, why, told)


def _buckets_without_a_block(resources: Sequence[Resource]) -> Iterator[GuardFinding]:
    buckets = [it for it in resources if it.type in BUCKETS and it.act in ("is", "create")]
    blocks = [it for it in resources if it.type in BLOCKS and it.act != "delete"]
    if len(buckets) > len(blocks):
        names = ", ".join(bucket.name for bucket in buckets)
        found = f"{len(buckets)} buckets and {len(blocks)} public access blocks"
        why = "a bucket without one is as public as its next policy"
        yield GuardFinding("GUARD-PUBLIC-BUCKET", names, found, why, "give each a BucketPublicAccessBlock")


def _cost(resources: Iterable[Resource], allowed: Allowed) -> Iterator[GuardFinding]:
    """Machines alone: they are what a fleet costs, and what is paid for by the hour."""
    if allowed.usd_per_hour is None:
        return
    total, unknown = 0.0, set[str]()
    templates = {it.urn: it for it in resources if it.type in TEMPLATES}
    for machine in resources:
        if machine.type not in NODES or machine.act == "delete":
            continue
        asked = [machine.inputs, *(templates[urn].inputs for urn in machine.made_of if urn in templates)]
        kind = next((its["instanceType"] for its in asked if "instanceType" in its), "a machine of an unknown type")
        markets = [market for its in asked for market in _mappings([its.get("instanceMarketOptions")])]
        spot = any(market.get("marketType") == "spot" for market in markets)
        price = allowed.price(str(kind), "spot" if spot else "on-demand")
        if price is None:
            unknown.add(str(kind))
        else:
            total += price
    if unknown:
        found = f"nobody says what {', '.join(sorted(unknown))} costs"
        change = "add its price to the fleet's planning, or leave --fleet out"
        yield GuardFinding("GUARD-COST", "the fleet", found, "so its cost cannot be held to the plan", change)
    if total > allowed.usd_per_hour * 1.0001:
        found = f"{total:.2f} USD an hour"
        why = f"the plan says {allowed.usd_per_hour:.2f}"
        change = "plan again with `gpuyard plan`, or take out what the plan does not have"
        yield GuardFinding("GUARD-COST", "the fleet", found, why, change)


# --- plain data ----------------------------------------------------------------------------------------------------


def _later(value: object) -> bool:
    """Known when it was made, or a secret: not to be judged here."""
    if isinstance(value, Mapping):
        return _SECRET in value
    return isinstance(value, str) and value in ("04da6b54-80e4-46f7-96ec-b56ff0331ba9", "[secret]")


def _mappings(value: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list):
        for item in cast("list[object]", value):
            if isinstance(item, Mapping):
                yield cast("Mapping[str, Any]", item)


def _texts(value: object) -> list[str]:
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def _statements(document: object) -> Iterator[Mapping[str, Any]]:
    """Of a policy as text or as data. One that is known later, or is no JSON, says nothing."""
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except ValueError:
            return
    if isinstance(document, Mapping):
        told: object = cast("Mapping[str, Any]", document).get("Statement")
        yield from _mappings(cast("list[object]", told) if isinstance(told, list) else [told])


def _every(name: str) -> bool:
    """Whether the name of a resource means all, or all of one kind: `*`, `arn:aws:s3:::*`, `arn:…:role/*`.

    `arn:aws:s3:::models/*` is one bucket's objects, and `…:log-group:/fleet:*` one group's streams.
    """
    parts = name.split(":", 5)
    if len(parts) < 6:
        return name.endswith("*")
    account, its = parts[4:]
    words = [word for word in re.split("[:/]", its) if word]
    # Where there is an account, what stands first and is a plain word says the kind.
    if account and len(words) > 1 and re.fullmatch("[A-Za-z-]+", words[0]):
        words = words[1:]
    return not words[:1] or not words[0].strip("*?")


def _anybody_may(statement: Mapping[str, Any]) -> bool:
    """Whether everybody is meant, and no condition says who."""
    principal: object = statement.get("Principal")
    told = list(cast("Mapping[str, Any]", principal).values()) if isinstance(principal, Mapping) else [principal]
    everybody = "NotPrincipal" in statement or any("*" in _texts(who) for who in told)
    return everybody and not _says_who(statement.get("Condition"))


def _says_who(condition: object) -> bool:
    """Whether one of the conditions, all of which have to hold, leaves only some that may."""
    if _later(condition) or not isinstance(condition, Mapping):
        return _later(condition)
    for operator, asked in cast("Mapping[str, Any]", condition).items():
        if not _NARROWS.fullmatch(operator) or not isinstance(asked, Mapping):
            continue
        for key, value in cast("Mapping[str, Any]", asked).items():
            names = _texts(value)
            if key.lower() in NARROWING and (_later(value) or (names and all(map(_is_named, names)))):
                return True
    return False


def _is_named(value: str) -> bool:
    """Whether a value means one, or all of one account: of an ARN the account, else the whole, without a wildcard."""
    if not value.startswith("arn:"):
        return bool(value) and not {"*", "?"} & set(value)
    parts = value.split(":", 5)
    its = parts[4] or parts[-1]
    return len(parts) == 6 and not {"*", "?"} & set(its)
