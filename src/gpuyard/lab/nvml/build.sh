#!/bin/bash
# Inside a copy of the nodes' base system: compile the simulated NVML, fetch the real nvidia-smi.
#
#   build.sh SOURCES TARGET PACKAGE VERSION SHA256 FILE
#
# Where the archive carries another version, TARGET/offered says which, and nothing else is made.
set -euo pipefail
sources=$1 target=$2 package=$3 version=$4 sha256=$5 file=$6

rm -rf "$target"
mkdir -p "$target"
# The node's own archive, with the component that holds NVIDIA's programs.
sed -E 's/^(deb .*[^ ]) +main.*$/\1 main non-free/' /etc/apt/sources.list >/tmp/sources.list
apt=(-q -o Dir::Etc::sourcelist=/tmp/sources.list -o Dir::Etc::sourceparts=- -o Acquire::Retries=3)
apt-get "${apt[@]}" update --error-on=any
if ! apt-cache "${apt[@]}" madison "$package" | cut -d'|' -f2 | tr -d ' ' | grep -Fxq "$version"; then
    apt-cache "${apt[@]}" madison "$package" >"$target/offered"
    exit 0
fi
cd /tmp
apt-get "${apt[@]}" download "$package=$version"
printf '%s  %s\n' "$sha256" "$package"_*.deb | sha256sum --check --quiet
dpkg-deb --extract "$package"_*.deb /tmp/package
DEBIAN_FRONTEND=noninteractive apt-get "${apt[@]}" install --yes --no-install-recommends gcc libc6-dev >/dev/null
gcc -std=gnu11 -O1 -Wall -Wextra -Werror -Wno-cast-function-type -fvisibility=hidden -fPIC -shared -pthread \
    -Wl,-soname,libnvidia-ml.so.1 -o "$target/libnvidia-ml.so" "$sources"/*.c
install -m 0755 "/tmp/package/$file" "$target/nvidia-smi"
sync -f "$target"
