"""The driver as a package that is built for each kernel, for nodes that have a kernel of their own."""

from __future__ import annotations

from importlib import resources

from gpuyard.lab.packages.recipes import REVISION, Package

_DKMS = """\
PACKAGE_NAME="nvidia"
PACKAGE_VERSION="{version}"
BUILT_MODULE_NAME[0]="nvidia"
DEST_MODULE_LOCATION[0]="/updates/dkms"
AUTOINSTALL="yes"
"""
# What a package's scripts look like that were made with dh_dkms.
_POSTINST = 'if [ "$1" = configure ]; then /usr/lib/dkms/common.postinst nvidia {version} "" "" "$2"; fi'
_PRERM = 'case "$1" in remove | upgrade | deconfigure) dkms remove -m nvidia -v {version} --all ;; esac'


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
            f"{source}/dkms.conf": _DKMS.format(version=version),
            # There is no card on the bus whose identity would have it loaded.
            "usr/lib/modules-load.d/nvidia.conf": "nvidia\n",
        },
        postinst=_POSTINST.format(version=version),
        prerm=_PRERM.format(version=version),
    )
