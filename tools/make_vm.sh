#!/bin/bash
# Make the disk that the lab's QEMU nodes start from: Debian with a kernel, what builds kernel modules, and two newer
# kernels as packages, so that an upgrade inside needs no network. As root; all that is fetched is verified by apt.
# An emulated processor does there what it must: what can be done here, at full speed, is done here.
#
#   make_vm.sh SUITE FOLDER [MIRROR]      makes FOLDER/disk.img
set -euo pipefail

PACKAGES=dbus,dkms,gcc,grub-pc-bin,grub2-common,initramfs-tools,iproute2,kmod,make,mdadm,nfs-kernel-server,nvme-cli
PACKAGES+=,openssh-server,procps,python3,python3-apt,systemd,systemd-sysv,udev,xfsprogs
GIB=8
START=2048 # sectors before the file system: the boot loader lies there
DISK=67707964 # the disk's signature, by which the kernel finds its root whatever the order of the disks

# A cloud's kernel has in it what finds and mounts the disk: no initrd is made, loaded or unpacked. Of emulated clocks
# the TSC is the one that costs nothing to read, and the kernel doubts it.
BOOT="
set root=(hd0,msdos1)
linux /vmlinuz root=PARTUUID=$DISK-01 rw console=ttyS0 net.ifnames=0 loglevel=4 mitigations=off tsc=reliable
boot
"
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
    local root=$1 kernels release line folder
    cd "$root"
    # Taken away as by hand, which dpkg respects: an initrd would be the slowest part of a kernel upgrade.
    rm etc/kernel/postinst.d/initramfs-tools
    # The three newest for which the archive has headers too, of the suite's own line of kernels: oldest first.
    line=$(chroot . apt-cache depends linux-headers-cloud-amd64 |
        sed -n 's/^ *Depends: linux-headers-\([0-9]*\.[0-9]*\.\).*/\1/p')
    kernels=()
    for release in $(chroot . apt-cache pkgnames "linux-headers-$line" |
        sed -n 's/^linux-headers-\(.*-cloud-amd64\)$/\1/p' | sort -V); do
        if chroot . apt-get --print-uris download "linux-image-$release" "linux-headers-$release" >/dev/null 2>&1; then
            kernels+=("$release")
        fi
    done
    if [ "${#kernels[@]}" -lt 3 ]; then
        echo "the archive offers ${#kernels[@]} kernels ${line}* with headers, and three are needed" >&2
        return 1
    fi
    kernels=("${kernels[@]: -3}")
    chroot . apt-get install --yes "linux-image-${kernels[0]}" "linux-headers-${kernels[0]}"
    for release in "${kernels[@]:1}"; do
        # Thousands of files, without which nothing is built, and with which alone neither.
        chroot . apt-get install --yes "linux-headers-${release%-cloud-amd64}-common"
    done
    for release in "${kernels[@]:1}"; do
        folder=var/lib/gpuyard-lab/kernels/$release
        mkdir -p "$folder"
        chroot . apt-get install --yes --download-only "linux-image-$release" "linux-headers-$release" \
            -o "Dir::Cache::archives=/$folder"
        rm -rf "${folder:?}/"{lock,partial}
        unpacked "$folder"/*.deb
    done
    printf '%s' "$NETWORK" >etc/systemd/network/10-eth0.network
    printf '%s' "$SEED" >etc/systemd/system/gpuyard-seed.service
    chroot . systemctl enable --quiet gpuyard-seed.service systemd-networkd.service
    # Nothing by the clock, and nothing for hardware that is not there.
    chroot . systemctl mask --quiet \
        {apt-daily,apt-daily-upgrade,dpkg-db-backup,e2scrub_all,fstrim,systemd-tmpfiles-clean}.timer \
        {e2scrub_reap,getty-static,getty@tty1,nvmefc-boot-connections,nvmf-autoconnect,systemd-pstore}.service \
        systemd-networkd-wait-online.service
    # Started by who needs it.
    chroot . systemctl disable --quiet nfs-server.service rpcbind.{service,socket}
    chroot . systemctl mask --quiet nfs-blkmap.service
    rm -f etc/ssh/ssh_host_*
    : >etc/machine-id
    printf '%s' "$BOOT" >boot/early.cfg
    chroot . grub-mkimage --format i386-pc --output /boot/core.img --prefix / --config /boot/early.cfg \
        biosdisk part_msdos ext2 linux
}

unpacked() { # DEB...: the same packages, whose content dpkg need not decompress
    local deb
    for deb; do
        dpkg-deb --raw-extract "$deb" "$deb.d"
        dpkg-deb --build -Znone "$deb.d" "$deb"
        rm -rf "$deb.d"
    done
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
swapped() { # HEX: eight digits, the lowest byte first
    echo "${1:6:2}${1:4:2}${1:2:2}${1:0:2}"
}
bytes() { # HEX AT: over what lies there in the image
    printf '%b' "$(sed 's/../\\x&/g' <<<"$1")" | dd of="$image" bs=1 seek="$2" conv=notrunc status=none
}
start=$(printf '%08x' "$START") sectors=$(printf '%08x' "$((GIB * 2097152 - START))")
bytes "80feffff83feffff$(swapped "$start")$(swapped "$sectors")$(printf '%096d' 0)" 446
bytes "$(swapped "$DISK")" 440
rm -rf --one-file-system "$root"
