"""What a fleet asks of AWS. No node is told of it but by the handover, so no lock grows stale by it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gpuyard.spec.closed import Closed

Region = Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]{2,10}){1,2}-[0-9]$")]
Zone = Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]{2,10}){1,2}-[0-9][a-z]$")]
Cidr = Annotated[str, Field(pattern=r"^([0-9]{1,3}\.){3}[0-9]{1,3}/[0-9]{1,2}$")]
Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9 _.:/=+@-]{1,128}$")]
BucketName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$")]
ProjectPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,200}$")]

AmiId = Annotated[str, Field(pattern=r"^ami-[0-9a-f]{8,17}$")]
VpcId = Annotated[str, Field(pattern=r"^vpc-[0-9a-f]{8,17}$")]
SubnetId = Annotated[str, Field(pattern=r"^subnet-[0-9a-f]{8,17}$")]
RouteTableId = Annotated[str, Field(pattern=r"^rtb-[0-9a-f]{8,17}$")]
EndpointId = Annotated[str, Field(pattern=r"^vpce-[0-9a-f]{8,17}$")]
GATEWAY_ROOT_GIB = 30
"""Size of a gateway's root volume, in GiB: it holds a system and logs."""

NOTICE_PORT = 840
"""Where a GPU node tells the gateways whether it goes on. Below 1024: no engine can take it."""


def _in_the_calendar(moment: str) -> str:
    datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S%z")
    return moment


Moment = Annotated[
    str,
    Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"),
    AfterValidator(_in_the_calendar),
]
ReservationId = Annotated[str, Field(pattern=r"^cr-[0-9a-f]{8,17}$")]


class Image(Closed):
    """The image that every machine starts from. It is named by its id: a name would be another image tomorrow."""

    id: AmiId
    """Id of the image in the fleet's region, e.g. ami-0123456789abcdef0."""
    architecture: Literal["x86_64", "arm64"] = "x86_64"
    """Architecture of the image, as EC2 tells it."""
    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
    """Account that the image opens to the key, e.g. admin on Debian, ubuntu on Ubuntu."""
    root_device: Literal["/dev/xvda", "/dev/sda1"]
    """Name of the image's root volume, as EC2 tells it: /dev/xvda on Debian, /dev/sda1 on Ubuntu."""


class Network(Closed):
    """The VPC: a new one, or one that is there."""

    cidr: Cidr | None = None
    """Addresses of a new VPC, e.g. 10.60.0.0/16; each zone gets a private and a public subnet of it."""
    vpc: VpcId | None = None
    """An existing VPC. Nothing in it is changed but what make_endpoints asks for."""
    subnets: dict[Zone, SubnetId] | None = None
    """Of an existing VPC: the private subnet of each zone."""
    gateway_subnets: dict[Zone, SubnetId] | None = None
    """Of an existing VPC: the subnet of each zone in which the load balancer stands; left out, the private ones."""
    route_tables: tuple[RouteTableId, ...] = ()
    """Of an existing VPC, with make_endpoints s3: the route tables of its private subnets, which get the way to S3."""
    s3_endpoint: EndpointId | None = None
    """Of an existing VPC: its endpoint of S3, the only one to read the bucket through; left out, any of this VPC."""
    make_endpoints: tuple[Literal["s3", "ssm"], ...] = ()
    """Of an existing VPC: endpoints to make in it, for the whole VPC; left out, none. A new VPC gets both."""
    subnet_bits: Annotated[int, Field(ge=16, le=28)] = 20
    """Length of the prefix of a new subnet: 20 holds 4,091 machines."""
    clients: tuple[Cidr, ...] = ()
    """Who outside may reach the gateway's port; left out, nobody: the load balancer is an internal one."""

    def makes(self, service: Literal["s3", "ssm"]) -> bool:
        """Whether the VPC gets an endpoint of this service from us."""
        return self.vpc is None or service in self.make_endpoints


class Access(Closed):
    """How Ansible reaches the machines."""

    method: Literal["ssm", "bastion", "ssh"] = "ssm"
    """ssm: SSH through a session of the Systems Manager, no port open; bastion: through a host; ssh: straight."""
    public_key: Annotated[str, Field(pattern=r"^(ssh-ed25519|ecdsa-sha2-nistp256) [A-Za-z0-9+/=]{40,200}( [ -~]*)?$")]
    """Public SSH key of the operators."""
    private_key_file: Annotated[str, Field(pattern=r"^(~|)/[^\x00-\x1f\x7f%\"'\\$]*$")]
    """Where each operator has the private one, e.g. ~/.ssh/id_ed25519. It is never read here."""
    bastion: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}@[A-Za-z0-9.-]{1,253}$")] | None = None
    """For method bastion: user@host of the bastion."""
    sources: tuple[Cidr, ...] = ()
    """For methods bastion and ssh: addresses that SSH is open to, e.g. that of the bastion."""


class Lustre(Closed):
    """An FSx for Lustre file system, PERSISTENT_2 on SSD, shared by all GPU nodes."""

    zone: Zone
    """Zone it stands in: that of the pools that read it."""
    tib: Annotated[float, Field(ge=1.2, le=1024)]
    """Size in TiB as FSx counts it: 1.2, or a multiple of 2.4."""
    mb_s_per_tib: Literal[125, 250, 500, 1000] = 500
    """Throughput for each TiB, in MB/s."""
    efa: bool = False
    """Reach it over EFA and GPUDirect Storage, where the nodes have EFA."""


class Repository(Closed):
    """Where nodes take NVIDIA's packages from."""

    uri: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.-]+(/[A-Za-z0-9._~/-]*)?$")]
    """Address of the repository, or of a copy of it."""
    key_file: ProjectPath
    """Its public key in armour, a file of this project."""


class Budget(Closed):
    """An alarm on the bill of what carries the fleet's tag."""

    usd_per_month: Annotated[float, Field(gt=0)]
    """A month's bill: a mail is sent at 80 % and at 100 % of it, and when AWS forecasts more."""
    email: Annotated[str, Field(pattern=r"^[^@\s]{1,64}@[A-Za-z0-9.-]{1,190}$")]
    """Who gets it."""


class Aws(Closed):
    """What stands around the machines of a fleet on AWS."""

    region: Region
    """Region, e.g. us-east-1."""
    zones: Annotated[tuple[Zone, ...], Field(min_length=1, max_length=6)]
    """Zones in the order in which they are tried; gateways are spread over the first two."""
    image: Image
    """What every machine starts from."""
    network: Network
    """The VPC."""
    access: Access
    """By which way Ansible comes to the machines."""
    bucket: BucketName
    """Name of the S3 bucket that the fleet's models are served from; only the fleet's VPC reads it."""
    nvidia_repository: Repository
    """Source of NVIDIA's packages."""
    gateway_instance: Annotated[str, Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")]
    """Type of a gateway's machine, e.g. c7i.xlarge."""
    lustre: Lustre | None = None
    """A parallel file system."""
    efs: bool = False
    """An EFS file system, for what is small and shared across zones."""
    budget: Budget | None = None
    """An alarm on the bill."""
    tags: dict[Tag, Tag] = Field(default_factory=dict)
    """Tags of everything, beside those that name the fleet."""


class PoolAws(Closed):
    """What a pool asks of AWS beside its machine."""

    zones: Annotated[tuple[Zone, ...], Field(min_length=1, max_length=6)] | None = None
    """Zones of this pool in the order in which they are tried; left out, the fleet's."""
    network_cards: Annotated[int, Field(ge=1, le=64)] | None = None
    """How many network cards get an EFA interface; left out, all that have EFA, or one card without `efa`."""
    placement_group: bool | None = None
    """Whether the nodes stand close together, in one zone; left out, where the pool has EFA and no Capacity Block."""
    reservation: ReservationId | None = None
    """The capacity reservation that the nodes run in; with purchase capacity-block, the block's."""
    block_ends: Moment | None = None
    """When the Capacity Block ends, as EC2 tells it, e.g. 2026-12-07T11:30:00Z. Nodes close before that."""
    root_gib: Annotated[int, Field(ge=30, le=16384)] = 200
    """Size of the root volume, in GiB."""
