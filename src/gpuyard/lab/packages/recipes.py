"""What the lab's apt repository holds: the vendor's package names, versions and relations, with a simulation inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources

from gpuyard.lab import nvml
from gpuyard.lab.packages import dkms_source

BRANCHES = {"580": ("580.126.20", "580.105.08"), "590": ("590.48.01", "590.44.01")}
REVISION = "1"
TOOLKIT, TOOLKIT_RELEASE = "13.0.2", "13.0"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
_SERVICE = """\
[Unit]
Description={description} (simulated)
{unit}
[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{service}
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str
    summary: str
    depends: str = ""
    conflicts: str = ""
    provides: str = ""
    files: dict[str, str] = field(default_factory=dict[str, str])
    programs: dict[str, str] = field(default_factory=dict[str, str])
    built: dict[str, str] = field(default_factory=dict[str, str])
    """Files of what set-up built for `gpuyard.lab.nvml`, by the path they are installed under."""
    links: dict[str, str] = field(default_factory=dict[str, str])
    postinst: str = ""
    prerm: str = ""

    @property
    def control(self) -> str:
        fields = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": "amd64",
            "Maintainer": "gpuyard lab <lab@localhost>",
            "Section": "non-free/admin",
            "Priority": "optional",
            "Depends": self.depends,
            "Conflicts": self.conflicts,
            "Replaces": self.conflicts,
            "Provides": self.provides,
            "Description": f"{self.summary} (simulated)\n The vendor's name and relations; nothing in it knows a GPU.",
        }
        return "".join(f"{key}: {value}\n" for key, value in fields.items() if value)


def packages() -> Iterator[Package]:
    for branch, versions in BRANCHES.items():
        yield pinning(branch)
        for version in versions:
            yield from driver(version)
    yield toolkit()


def pinning(branch: str) -> Package:
    names = "nvidia-kernel* libnvidia-* nvidia-driver-cuda nvidia-persistenced nvidia-fabricmanager"
    return Package(
        name=f"nvidia-driver-pinning-{branch}",
        version=f"{branch}-{REVISION}",
        summary=f"apt preferences that keep the driver on branch {branch}",
        provides="nvidia-driver-pinning",
        conflicts="nvidia-driver-pinning",
        files={
            # Below 1001, so that the pin of one exact version, where there is one, stays the stronger.
            "etc/apt/preferences.d/nvidia-driver-pinning": (
                f"Package: {names}\nPin: version {branch}.*\nPin-Priority: 1000\n"
            )
        },
    )


def driver(version: str) -> Iterator[Package]:
    same = f"(= {version}-{REVISION})"
    full = f"{version}-{REVISION}"
    for flavour, name, other in (
        ("open", "nvidia-kernel-open-dkms", "nvidia-kernel-dkms"),
        ("proprietary", "nvidia-kernel-dkms", "nvidia-kernel-open-dkms"),
    ):
        yield Package(
            name=name,
            version=full,
            summary=f"NVIDIA kernel modules, {flavour} flavour",
            conflicts=other,
            files={
                "lib/modules/gpuyard-lab/nvidia.ko": json.dumps({"version": version, "flavour": flavour}) + "\n",
                # The simulated kernel loads the file above; this one is there for what it costs to make.
                f"usr/src/nvidia-{version}/dkms.conf": (
                    dkms_source.CONF.format(version=version)
                    + 'MAKE[0]="python3 compile.py"\nCLEAN="true"\nSTRIP[0]="no"\n'
                ),
                f"usr/src/nvidia-{version}/compile.py": dkms_source.COMPILE,
            },
            postinst=dkms_source.POSTINST.format(version=version, unless=f" && [ -e {dkms_source.COST} ]"),
            prerm=f"if [ -e {dkms_source.COST} ]; then\n{dkms_source.PRERM.format(version=version)}\nfi",
        )
    yield Package(
        name="libnvidia-ml1",
        version=full,
        summary="NVIDIA management library (NVML)",
        # One library for all versions: it reads its version from its name.
        built={f"{LIBRARIES}/libnvidia-ml.so.{version}": nvml.LIBRARY},
        links={f"{LIBRARIES}/libnvidia-ml.so.1": f"libnvidia-ml.so.{version}"},
    )
    yield Package(
        name="libcuda1",
        version=full,
        summary="NVIDIA CUDA driver library",
        # Without the library: engines of the lab that find one would take the node for one with a GPU.
        files={"usr/share/doc/libcuda1/README": "simulated: there is no libcuda.so.1 in this package\n"},
    )
    yield Package(
        name="nvidia-driver-cuda",
        version=full,
        summary="NVIDIA driver for computing",
        depends=f"libnvidia-ml1 {same}, nvidia-kernel-open-dkms {same} | nvidia-kernel-dkms {same}",
        built={"usr/bin/nvidia-smi": nvml.SMI},
    )
    yield Package(
        name="nvidia-persistenced",
        version=full,
        summary="NVIDIA persistence daemon",
        depends=f"python3, libnvidia-ml1 {same}",
        programs={"usr/bin/nvidia-persistenced": _program(version)},
        files={
            "lib/systemd/system/nvidia-persistenced.service": _SERVICE.format(
                description="NVIDIA Persistence Daemon",
                unit="Wants=syslog.target\n",
                command="/usr/bin/nvidia-persistenced --persistence-mode --verbose",
                service="Restart=always\nRestartSec=5\nRuntimeDirectory=nvidia-persistenced\n",
            )
        },
        # As in Debian's packages: on at once, and a start that fails because no driver is loaded yet fails no install.
        postinst=(
            "systemctl daemon-reload\nsystemctl enable --quiet nvidia-persistenced.service\n"
            "systemctl restart nvidia-persistenced.service || true"
        ),
        prerm='[ "$1" = upgrade ] || systemctl disable --quiet --now nvidia-persistenced.service',
    )
    yield Package(
        name="nvidia-fabricmanager",
        version=full,
        summary="NVIDIA fabric manager for NVSwitch systems",
        # Not even the vendor's package asks for the driver of its own version: that they match is the operator's care.
        depends="python3",
        programs={"usr/bin/nv-fabricmanager": _program(version)},
        files={
            "lib/systemd/system/nvidia-fabricmanager.service": _SERVICE.format(
                description="NVIDIA fabric manager service",
                unit="After=network-online.target\nRequires=network-online.target\n",
                command="/usr/bin/nv-fabricmanager -c /usr/share/nvidia/nvswitch/fabricmanager.cfg",
                service="",
            ),
            "usr/share/nvidia/nvswitch/fabricmanager.cfg": "LOG_LEVEL=4\nFABRIC_MODE=0\n",
        },
        postinst="systemctl daemon-reload",
        prerm='[ "$1" = upgrade ] || systemctl disable --quiet --now nvidia-fabricmanager.service',
    )


def toolkit() -> Package:
    home = f"usr/local/cuda-{TOOLKIT_RELEASE}"
    said = f"Cuda compilation tools, release {TOOLKIT_RELEASE}, V{TOOLKIT}"
    return Package(
        name=f"cuda-toolkit-{TOOLKIT_RELEASE.replace('.', '-')}",
        version=f"{TOOLKIT}-{REVISION}",
        summary=f"CUDA toolkit {TOOLKIT_RELEASE}",
        files={f"{home}/version.json": json.dumps({"cuda": {"name": "CUDA SDK", "version": TOOLKIT}}, indent=1) + "\n"},
        programs={f"{home}/bin/nvcc": f"#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho '{said}'\n"},
        postinst=f"update-alternatives --install /usr/local/cuda cuda /{home} 130",
        prerm=f'[ "$1" = upgrade ] || update-alternatives --remove cuda /{home}',
    )


def _program(version: str) -> str:
    return resources.files(__package__).joinpath("simulated_driver.py").read_text().replace("@VERSION@", version)
