#!/bin/bash
# Run one command in the nodes' base system, on a copy of it in memory that is gone afterwards.
#
#   in_root.sh ROOT [--bind ro|rw HOST INSIDE]... -- COMMAND...
#
# Mounts and processes live in namespaces of their own, so nothing is left behind however this ends. The network is the
# host's, with its name resolution.
set -euo pipefail

# The first process of a namespace is 1: anyone else is outside.
if [ "$$" != 1 ]; then
    exec unshare --mount --propagation private --pid --fork --kill-child -- "$0" "$@"
fi

root=$(realpath -- "$1")
shift
cd "$root" # relative paths below: a colon or a comma in a path would be read as a mount option
mount -t tmpfs -o mode=0755 gpuyard mnt
mkdir mnt/upper mnt/work
mount -t overlay -o lowerdir=.,upperdir=mnt/upper,workdir=mnt/work gpuyard .
cd "$root"
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs -o mode=1777 gpuyard tmp

bind() { # ro|rw HOST INSIDE
    if [ -d "$2" ]; then mkdir -p ".$3"; else mkdir -p ".${3%/*}" && rm -f ".$3" && : >".$3"; fi
    mount --bind "$2" ".$3"
    if [ "$1" = ro ]; then mount -o remount,bind,ro ".$3"; fi
}
for file in /etc/resolv.conf /etc/hosts; do
    if [ -e "$file" ]; then bind ro "$(realpath "$file")" "$file"; fi
done
while [ "$1" = --bind ]; do
    bind "$2" "$3" "$4"
    shift 4
done
shift # --

exec chroot . "$@"
