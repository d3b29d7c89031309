"""How a package brings the source of a kernel module for DKMS: what its scripts say that were made with dh_dkms."""

from __future__ import annotations

CONF = """\
PACKAGE_NAME="nvidia"
PACKAGE_VERSION="{version}"
BUILT_MODULE_NAME[0]="nvidia"
DEST_MODULE_LOCATION[0]="/updates/dkms"
AUTOINSTALL="yes"
"""
POSTINST = """\
if [ "$1" = configure ]{unless}; then
  /usr/lib/dkms/common.postinst nvidia {version} /usr/share/nvidia-dkms "" "$2"
fi"""
PRERM = """\
case "$1" in
  remove | upgrade | deconfigure)
    if [ "$(dkms status -m nvidia -v {version})" ]; then dkms remove -m nvidia -v {version} --all; fi ;;
esac"""

# Where a node is told what a compiler would cost it: seconds of processor time. Without it a package of the lab has its
# module ready to be loaded.
COST = "/var/lib/gpuyard-lab/compile_seconds"
COMPILED = "/var/lib/gpuyard-lab/compiled"
"""A line of JSON for each compilation: from and until, in seconds since 1970, and seconds of processor time."""
# A compiler's work without a compiler: on all processors, and an object file at the end of it.
COMPILE = f"""\
import json, multiprocessing, os, resource, subprocess, time

def work(seconds):
    while time.process_time() < seconds:
        pass

begun = time.time()
count = os.cpu_count()
workers = [multiprocessing.Process(target=work, args=(float(open("{COST}").read()) / count,)) for _ in range(count)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
used = resource.getrusage(resource.RUSAGE_CHILDREN)
subprocess.run(["as", "-o", "nvidia.ko", "-"], input=b"", check=True)
with open("{COMPILED}", "a") as log:
    line = {{"from": begun, "until": time.time(), "seconds": round(used.ru_utime + used.ru_stime, 1)}}
    log.write(json.dumps(line) + "\\n")
"""
