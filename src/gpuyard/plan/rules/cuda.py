"""CUDA toolkits and cuda-compat."""

from __future__ import annotations

from gpuyard.catalog import numbers
from gpuyard.catalog.rows import Branch, DriverRelease, Gpu, Severity, Toolkit
from gpuyard.plan.rules.rule import COMPATIBILITY, MATRIX, Misfit, rule


@rule(
    "COMPAT-TOOLKIT-DRIVER",
    "The driver is within the minor-version compatibility of the CUDA toolkit, or cuda-compat bridges the majors.",
    reason="What a toolkit compiles runs on every driver of its major, from the major's first on.",
    source=COMPATIBILITY,
    fits={"toolkit": "13.0", "driver": "580.65.06"},
    fails={"toolkit": "13.0", "driver": "570.133.20"},
)
def _toolkit_driver(toolkit: Toolkit, driver: DriverRelease, forward_compatibility: bool = False) -> Misfit | None:
    if numbers(driver.version) < numbers(toolkit.driver_min) and not forward_compatibility:
        return Misfit(f"driver {driver.version}", f"{toolkit.driver_min} or newer for CUDA {toolkit.toolkit}")
    return None


@rule(
    "COMPAT-TOOLKIT-PTX",
    "The driver is as new as the toolkit, or nothing is compiled at run time from PTX.",
    reason="A toolkit newer than the driver works within a major, but not its PTX, which the driver cannot compile.",
    source=COMPATIBILITY,
    fits={"toolkit": "13.0", "driver": "580.126.20"},
    fails={"toolkit": "13.2", "driver": "580.126.20"},
)
def _toolkit_ptx(toolkit: Toolkit, driver: DriverRelease, forward_compatibility: bool = False) -> Misfit | None:
    native = toolkit.driver_native_min
    # cuda-compat brings a compiler of PTX that is as new as itself.
    if (
        native
        and not forward_compatibility
        and numbers(toolkit.driver_min) <= numbers(driver.version) < numbers(native)
    ):
        need = f"{native} or newer for the PTX of CUDA {toolkit.version}"
        return Misfit(f"driver {driver.version}", need, "amber")
    return None


@rule(
    "COMPAT-TOOLKIT-GPU",
    "The CUDA toolkit compiles for the GPU.",
    reason="A toolkit older than an architecture has no code for it; CUDA 13 dropped all before Turing.",
    source=MATRIX,
    fits={"toolkit": "12.8", "gpu": "B200-SXM-180GB"},
    fails={"toolkit": "12.6", "gpu": "B200-SXM-180GB"},
)
def _toolkit_gpu(toolkit: Toolkit, gpu: Gpu) -> Misfit | None:
    if gpu.first_toolkit and numbers(toolkit.toolkit) < numbers(gpu.first_toolkit):
        return Misfit(f"CUDA toolkit {toolkit.toolkit}", f"{gpu.first_toolkit} or newer for {gpu.name}")
    if gpu.last_toolkit_major and numbers(toolkit.toolkit)[0] > gpu.last_toolkit_major:
        return Misfit(f"CUDA toolkit {toolkit.toolkit}", f"{gpu.last_toolkit_major}.x for {gpu.architecture}")
    return None


@rule(
    "COMPAT-FORWARD-GPU",
    "cuda-compat is for data-center GPUs and some RTX boards.",
    reason="On other GPUs the library refuses with CUDA error 804.",
    source=COMPATIBILITY,
    fits={"forward_compatibility": "true", "gpu": "H100-SXM5-80GB"},
    fails={"forward_compatibility": "true", "gpu": "RTX-PRO-6000-Blackwell-Workstation"},
)
def _forward_gpu(forward_compatibility: bool, gpu: Gpu) -> Misfit | None:
    if not forward_compatibility or gpu.cuda_compat == "supported":
        return None
    level: Severity = "amber" if gpu.cuda_compat == "some" else "red"
    return Misfit(f"cuda-compat on {gpu.name}", "a data-center GPU, or no cuda-compat", level)


@rule(
    "COMPAT-FORWARD-BRANCH",
    "The driver below cuda-compat is of a long-term or production branch.",
    reason="NVIDIA tests cuda-compat on these alone.",
    source=COMPATIBILITY,
    fits={"forward_compatibility": "true", "branch": "570"},
    fails={"forward_compatibility": "true", "branch": "575"},
)
def _forward_branch(forward_compatibility: bool, branch: Branch, toolkit: Toolkit | None = None) -> Misfit | None:
    oldest = toolkit.forward_from if toolkit else None
    if forward_compatibility and toolkit and oldest and int(branch.branch) < int(oldest):
        return Misfit(f"cuda-compat of CUDA {toolkit.toolkit} on branch {branch.branch}", f"branch {oldest} or newer")
    if forward_compatibility and branch.kind == "new-feature":
        return Misfit(f"cuda-compat on branch {branch.branch}", "a long-term or production branch")
    return None


@rule(
    "COMPAT-FORWARD-OLDER",
    "cuda-compat is newer than what the driver supports by itself.",
    reason="An older one stands before the driver's own library and ends CUDA with error 803.",
    source="vllm-project/vllm#33116 and #33369; " + COMPATIBILITY,
    fits={"forward_compatibility": "true", "toolkit": "13.0", "branch": "570"},
    fails={"forward_compatibility": "true", "toolkit": "12.9", "branch": "580"},
)
def _forward_older(forward_compatibility: bool, toolkit: Toolkit, branch: Branch) -> Misfit | None:
    if forward_compatibility and branch.cuda and numbers(toolkit.toolkit) <= numbers(branch.cuda):
        have = f"cuda-compat of CUDA {toolkit.toolkit} on branch {branch.branch}, which supports {branch.cuda}"
        return Misfit(have, "no cuda-compat")
    return None
