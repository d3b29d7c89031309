"""The driver as a package that is built for each kernel, for nodes that have a kernel of their own."""

from __future__ import annotations

from importlib import resources

from gpuyard.lab.packages import dkms_source
from gpuyard.lab.packages.recipes import REVISION, Package


def dkms(version: str) -> Package:
    """The open kernel modules under the vendor's name, of which only `nvidia` is there."""
    source = f"usr/src/nvidia-{version}"
    return Package(
        name="nvidia-kernel-open-dkms",
        version=f"{version}-{REVISION}",
        summary="NVIDIA kernel modules, open flavour, built by DKMS",
        depends="dkms",
        conflicts="nvidia-kernel-dkms",
        files={
            f"{source}/nvidia.c": resources.files(__package__).joinpath("stub_module.c").read_text(),
            f"{source}/Kbuild": f'obj-m := nvidia.o\nccflags-y := -DDRIVER_VERSION=\\"{version}\\"\n',
            f"{source}/dkms.conf": dkms_source.CONF.format(version=version),
            # There is no card on the bus whose identity would have it loaded.
            "usr/lib/modules-load.d/nvidia.conf": "nvidia\n",
        },
        postinst=dkms_source.POSTINST.format(version=version, unless=""),
        prerm=dkms_source.PRERM.format(version=version),
    )
