#!/bin/bash
# Make the disk that the lab's QEMU nodes start from: Debian with a kernel, what builds kernel modules, and two newer
# kernels as packages, so that an upgrade inside needs no network. As root; all that is fetched is verified by apt.
#
#   make_vm.sh SUITE FOLDER [MIRROR]      makes FOLDER/disk.img
set -euo pipefail

PACKAGES=dbus,dkms,gcc,grub-pc-bin,initramfs-tools,iproute2,kmod,make,mdadm,nvme-cli,openssh-server,procps,python3
PACKAGES+=,python3-apt,systemd,systemd-sysv,udev,xfsprogs
GIB=8
START=2048 # sectors before the file system: the boot loader lies there

BOOT='
set root=(hd0,msdos1)
linux /vmlinuz root=/dev/vda1 rw console=ttyS0 net.ifnames=0 loglevel=4 mitigations=off
initrd /initrd.img
boot
'
NETWORK='
[Match]
Name=eth0
[Network]
Address=10.0.2.15/24
LinkLocalAddressing=no
IPv6AcceptRA=no
'
# A tar as a disk: its host name and keys, and the packages of the lab. At each boot, so that no cut can leave half of it.
SEED='
[Unit]
Description=What the lab gives to this machine
After=dev-disk-by\x2did-virtio\x2dseed.device
Wants=dev-disk-by\x2did-virtio\x2dseed.device
Before=ssh.service
[Service]
Type=oneshot
ExecStart=tar --extract --file=/dev/disk/by-id/virtio-seed --directory=/
ExecStart=hostname --file /etc/hostname
[Install]
WantedBy=multi-user.target
'

inside() { # ROOT: as the last thing before apt's lists are removed
    local root=$1 kernels=() release
    cd "$root"
    # The initrd has what finds the disk and nothing else: it is packed anew, in emulation, at every kernel upgrade.
    sed -i 's/^MODULES=.*/MODULES=list/' etc/initramfs-tools/initramfs.conf
    printf '%s\n' virtio_pci virtio_blk ext4 >>etc/initramfs-tools/modules
    # The three newest for which the archive has headers too, a cloud's before any other: oldest first.
    for release in $(chroot . apt-cache pkgnames linux-headers- | sed -n 's/^linux-headers-\([0-9].*-amd64\)$/\1/p' |
        grep -v -- -rt- | sed 's/.*-cloud-.*/1 &/; t; s/^/0 /' | sort -V | cut -d' ' -f2); do
        if chroot . apt-get --print-uris download "linux-image-$release" "linux-headers-$release" >/dev/null 2>&1; then
            kernels+=("$release")
        fi
    done
    kernels=("${kernels[@]: -3}")
    if [ "${#kernels[@]}" != 3 ]; then
        echo "the archive offers ${#kernels[@]} kernels with headers, and three are needed" >&2
        return 1
    fi
    chroot . apt-get install --yes "linux-image-${kernels[0]}" "linux-headers-${kernels[0]}"
    for release in "${kernels[@]:1}"; do
        mkdir -p "var/lib/gpuyard-lab/kernels/$release"
        chroot . apt-get install --yes --download-only "linux-image-$release" "linux-headers-$release" \
            -o "Dir::Cache::archives=/var/lib/gpuyard-lab/kernels/$release"
        rm -rf "var/lib/gpuyard-lab/kernels/$release/"{lock,partial}
    done
    printf '%s' "$NETWORK" >etc/systemd/network/10-eth0.network
    printf '%s' "$SEED" >etc/systemd/system/gpuyard-seed.service
    chroot . systemctl enable --quiet gpuyard-seed.service systemd-networkd.service
    chroot . systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer systemd-networkd-wait-online.service
    rm -f etc/ssh/ssh_host_*
    : >etc/machine-id
    printf '%s' "$BOOT" >boot/early.cfg
    chroot . grub-mkimage --format i386-pc --output /boot/core.img --prefix / --config /boot/early.cfg \
        biosdisk part_msdos ext2 linux
}

if [ "$1" = --inside ]; then
    inside "$2"
    exit
fi

suite=$1 folder=$2
shift 2
mkdir -p "$folder"
root=$folder/root
hook="'$(realpath "$0")' --inside \"\$1\""
mmdebstrap --mode=root --variant=minbase --aptopt='Acquire::Retries "3"' --include="$PACKAGES" \
    --customize-hook="$hook" "$suite" "$root" "$@"
image=$folder/disk.img
truncate --size "${GIB}G" "$image"
mkfs.ext4 -q -d "$root" -E "offset=$((START * 512)),lazy_itable_init=0" "$image" "$((GIB * 1048576 - START / 2))"
cat "$root/usr/lib/grub/i386-pc/boot.img" "$root/boot/core.img" | dd of="$image" conv=notrunc status=none
# The partition table: one entry, bootable, Linux, from START to the end; where the others would be GRUB has code.
sectors=$((GIB * 2097152 - START))
entry=$(printf '80feffff83feffff%08x%08x' "$START" "$sectors" | sed -E 's/(.{16})(..)(..)(..)(..)(..)(..)(..)(..)/\1\5\4\3\2\9\8\7\6/')$(printf '%096d' 0)
printf '%b' "$(sed 's/../\\x&/g' <<<"$entry")" | dd of="$image" bs=1 seek=446 conv=notrunc status=none
rm -rf --one-file-system "$root"
