"""Faults of package repositories, of apt and of dpkg."""

from __future__ import annotations

from gpuyard.lab.faults.model import PACKAGE, Fault, Injection, OnNode, Parameter, Probe, Repository, Step
from gpuyard.lab.faults.words import helper, packages_kept

# The repository is asked with lists of one's own: a question must leave no trace in the node's.
_ASK = """\
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
mkdir -p "$own/lists/partial" "$own/cache/archives/partial"
ours() {{
  apt-get -o Dir::State::lists="$own/lists" -o Dir::Cache="$own/cache" -o APT::Sandbox::User=root \\
    -o Debug::NoLocking=1 -o Acquire::Retries=0 "$@" 2>&1
}}
sources=$(grep -rls :8099/nvidia /etc/apt/sources.list.d | head -n1)
only="-o Dir::Etc::sourcelist=$sources -o Dir::Etc::sourceparts=-"
update() {{ ours $only update --error-on=any; }}
newest() {{
  update >/dev/null
  apt-cache -o Dir::State::lists="$own/lists" -o Dir::Cache="$own/cache" $only madison "$1" | awk '{{print $3; exit}}'
}}
{question}"""


def repository(question: str) -> Probe:
    return Probe(_ASK.format(question=question))


def of_version(injection: Injection) -> str:
    """The packages of the kernel modules, of one driver where one is named."""
    version = injection.values.get("version")
    return f"{MODULES}_{version}-*" if version else MODULES


def in_postinst(package: str, words: str) -> Probe:
    """Whether the newest of a package would say so when it is configured."""
    return repository(
        f'version=$(newest {package})\n[ -n "$version" ] || exit 1\n'
        f'cd "$own" && ours $only download {package}="$version" >/dev/null\n'
        f"dpkg-deb --ctrl-tarfile {package}_*.deb | tar -xO ./postinst 2>/dev/null | grep -qF '{words}'"
    )


MODULES = "nvidia-kernel-*dkms"
_KERNEL = "$(uname -r)"
BUILD_FAILS = f"""\
echo "Building initial module for {_KERNEL}"
echo "Error! Bad return status for module build on kernel: {_KERNEL} ($(uname -m))" >&2
echo "Consult /var/lib/dkms/nvidia/$DPKG_MAINTSCRIPT_PACKAGE/build/make.log for more information." >&2
exit 10
"""
# dkms ends well here, which is the worse half of it: the package is installed, and there is no module.
NO_HEADERS = f"""\
echo "Module build for kernel {_KERNEL} was skipped since the"
echo "kernel headers for this kernel do not seem to be installed."
rm -f /lib/modules/gpuyard-lab/nvidia.ko
"""


def fails(injection: Injection) -> tuple[Step, ...]:
    code = injection.whole("code")
    return (Repository(postinst=(injection["package"], f'echo "post-installation step failed" >&2\nexit {code}\n')),)


def hangs(injection: Injection) -> tuple[Step, ...]:
    return (Repository(postinst=(injection["package"], 'echo "waiting for what never comes" >&2\nsleep infinity\n')),)


def without(injection: Injection) -> tuple[Step, ...]:
    version = injection["version"] or "*"
    return (Repository(without=f"{injection['package']}_{version}_*.deb"),)


SECOND = "/etc/apt/sources.list.d/gpuyard-lab-second.sources"


def second(_: Injection) -> tuple[Step, ...]:
    found = "found=$(grep -ls :8099/nvidia /etc/apt/sources.list.d/*.sources | head -n1)"
    write = f"sed 's#:8099/nvidia/*#:8099/nvidia-second/#' \"$found\" >{SECOND}"
    # As vendors tell users to: a file that lets everything of theirs win.
    pin = "Package: *\\nPin: release l=a second repository\\nPin-Priority: 1002\\n"
    preferences = "/etc/apt/preferences.d/gpuyard-lab-second.pref"
    return (
        Repository(second=True),
        OnNode(f"{found}\n{write}\nprintf '{pin}' >{preferences}", f"rm -f {SECOND} {preferences}"),
    )


def signed_by(_: Injection) -> tuple[Step, ...]:
    # Read last: the other way round apt takes the second for the first.
    file = "/etc/apt/sources.list.d/zz-gpuyard-lab-again.list"
    found = "uri=$(sed -n 's/^URIs: *//p' $(grep -ls :8099/nvidia /etc/apt/sources.list.d/*.sources) | head -n1)"
    return (OnNode(f"{found}\nprintf 'deb %s /\\n' \"$uri\" >{file}", f"rm -f {file}"),)


def lock_held(injection: Injection) -> tuple[Step, ...]:
    program = (
        "python3 -c 'import fcntl, time\n"
        'open("/proc/self/comm", "w").write("unattended-upgr")\n'
        'held = open("/var/lib/dpkg/lock-frontend", "r+")\n'
        "fcntl.lockf(held, fcntl.LOCK_EX)\n"
        f"time.sleep({injection['seconds']})'"
    )
    return (helper(injection, program, "dpkg --configure -a 2>&1 | grep -q 'frontend lock was locked'"),)


# Every package of the driver has the version of its library.
DRIVER = (
    "dpkg-query -W -f '${Version} ${Package}\\n' | "
    "awk -v v=\"$(dpkg-query -W -f '${Version}' libnvidia-ml1)\" '$1 == v {print $2}'"
)


def library_newer(_: Injection) -> tuple[Step, ...]:
    upgrade = f"""\
names=$({DRIVER})
now=$(dpkg-query -W -f '${{Version}}' libnvidia-ml1)
other=$(apt-cache madison libnvidia-ml1 | awk '{{print $3}}' | sort -uV | grep -vxF "$now" | tail -n1)
apt-get install -qq -y --allow-downgrades --allow-change-held-packages -o DPkg::Lock::Timeout=60 \\
  $(for name in $names; do echo "$name=$other"; done) >"$keep/log" 2>&1 || {{ cat "$keep/log" >&2; exit 1; }}"""
    restart = (
        "for unit in nvidia-persistenced nvidia-fabricmanager; do\n"
        "  systemctl is-enabled --quiet $unit 2>/dev/null && systemctl restart $unit || true\ndone"
    )
    return (OnNode("", restart), packages_kept(DRIVER), OnNode(upgrade))


def fabric_manager(_: Injection) -> tuple[Step, ...]:
    name = "nvidia-fabricmanager"
    change = f"""\
now=$(dpkg-query -W -f '${{Version}}' {name})
other=$(apt-cache madison {name} | awk '{{print $3}}' | sort -uV | grep -vxF "$now" | tail -n1)
apt-get install -qq -y --allow-downgrades --allow-change-held-packages -o DPkg::Lock::Timeout=60 {name}="$other" \\
  >"$keep/log" 2>&1 || {{ cat "$keep/log" >&2; exit 1; }}
systemctl restart {name} 2>/dev/null || true"""
    return (OnNode("", f"systemctl restart {name} || true"), packages_kept(f"echo {name}"), OnNode(change))


# dpkg says on its status pipe what it is about to write down: at the next word the one before is written.
_KILL = """\
python3 - "$keep"/*.deb {stage} {package} <<'PYTHON'
import os, signal, subprocess, sys
deb, stage, package = sys.argv[1:]
for attempt in range(20):
    dpkg = subprocess.Popen(["dpkg", "--status-fd", "1", "--force-confold", "-i", deb], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, start_new_session=True, close_fds=True)
    there = False
    for line in dpkg.stdout:
        words = line.split()
        if words[:1] != ["status:"]:
            continue
        if there:
            break
        there = words[-1] == stage
    try:
        os.killpg(dpkg.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    dpkg.wait()
    asked = ["dpkg-query", "-W", "-f", "${{db:Status-Status}}", package]
    if subprocess.run(asked, stdout=subprocess.PIPE, text=True).stdout == stage:
        sys.exit(0)
sys.exit("dpkg was faster than its killer, twenty times")
PYTHON"""
STAGES = ("half-installed", "unpacked", "half-configured")


def interrupted(injection: Injection) -> tuple[Step, ...]:
    package = injection["package"]
    stage = injection["stage"] if injection["stage"] != "any" else injection.dice.choice(STAGES)
    fetch = (
        f'[ -e "$keep"/{package}_*.deb ] || (cd "$keep" && apt-get -o APT::Sandbox::User=root download -qq '
        f"{package}=$(dpkg-query -W -f '${{Version}}' {package}))"
    )
    undo = f"""\
if ls "$keep"/{package}_*.deb >/dev/null 2>&1; then
  dpkg --configure -a || true
  state=$(dpkg-query -W -f '${{db:Status-Eflag}} ${{db:Status-Status}}' {package})
  [ "$state" = "ok installed" ] || dpkg --force-confold -i "$keep"/{package}_*.deb >"$keep/log" 2>&1 \\
    || {{ cat "$keep/log" >&2; exit 1; }}
fi"""
    restart = f"systemctl try-restart {package}.service 2>/dev/null || true"
    kill = _KILL.format(stage=stage, package=package)
    return (packages_kept(f"echo {package}"), OnNode(f"{fetch}\n{kill}", f"{undo}\n{restart}"))


FAULTS = (
    Fault(
        "repository-key-rotated",
        "the repository is signed with a key that the node does not know: NO_PUBKEY",
        "NVIDIA/cuda-repo-management#4; NVIDIA/nvidia-docker#1631",
        ("F07",),
        lambda _: (Repository(strange_key=True),),
        lambda _: repository("update | grep -q NO_PUBKEY"),
        needs=("repository",),
    ),
    Fault(
        "hash-sum-mismatch",
        "a package that ends in the middle, from a mirror that lags behind its index",
        "NVIDIA/cuda-repo-management#1",
        ("F08",),
        lambda injection: (Repository(truncated=f"{injection['package']}_*.deb", seed=injection.seed),),
        lambda injection: repository(
            f'version=$(newest {injection["package"]})\ncd "$own"\n'
            f"ours $only download {injection['package']}=\"$version\" | grep -Eq 'Hash Sum mismatch|unexpected size'"
        ),
        (Parameter("package", "which", "libnvidia-ml1", like=PACKAGE),),
        needs=("repository",),
    ),
    Fault(
        "index-stale",
        "an index that is another than the signed one: a mirror in the middle of its update",
        "NVIDIA/cuda-repo-management#1",
        ("F08",),
        lambda _: (Repository(stale_index=True),),
        lambda _: repository("update | grep -Eq 'Hash Sum mismatch|unexpected size'"),
        needs=("repository",),
    ),
    Fault(
        "version-missing",
        "a version that the repository does not have any more",
        "NVIDIA/gpu-operator#544 (fabric manager of the driver's version is not there)",
        ("F10",),
        without,
        lambda injection: repository(
            f"version={injection.quoted('version')}\nupdate >/dev/null\n"
            f'! apt-cache -o Dir::State::lists="$own/lists" -o Dir::Cache="$own/cache" $only madison '
            f"{injection['package']} | awk '{{print $3}}' | grep -qx \"${{version:-.*}}\""
        ),
        (
            Parameter("package", "which", "nvidia-fabricmanager", like=PACKAGE),
            Parameter("version", "of it; without, all", "", like=r"[0-9A-Za-z:.+~-]*"),
        ),
        needs=("repository",),
    ),
    Fault(
        "repository-second",
        "a second repository with newer packages that cannot be installed: held broken packages",
        "NVIDIA/ansible-role-nvidia-driver#11, #28, #33",
        ("F05",),
        second,
        lambda _: repository(
            'mkdir "$own/parts" && cp $(grep -ls :8099/ /etc/apt/sources.list.d/*) "$own/parts"\n'
            'only="-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$own/parts"\n'
            "ours $only update >/dev/null\nours $only -s install nvidia-driver-cuda | grep -q libnvidia-compute"
        ),
        needs=("repository",),
    ),
    Fault(
        "signed-by-conflict",
        "the same repository named twice, once without its key: apt reads no source at all",
        "NVIDIA/nvidia-docker#1631",
        ("F07",),
        signed_by,
        lambda _: Probe("apt-get check 2>&1 | grep -q 'Conflicting values set for option Signed-By'"),
        needs=("repository",),
    ),
    Fault(
        "dkms-build-fails",
        "the module does not build for this kernel, so its package stays half-configured",
        "pop-os/pop#3811; pop-os/beta#310",
        ("F02", "F20"),
        lambda injection: (Repository(postinst=(of_version(injection), BUILD_FAILS)),),
        lambda _: in_postinst("nvidia-kernel-open-dkms", "Bad return status for module build"),
        parameters=(Parameter("version", "of the driver; without, every one", "", like=r"[0-9.]*"),),
        needs=("repository",),
    ),
    Fault(
        "headers-missing",
        "no headers of this kernel: the package installs well and brings no module",
        "GoogleCloudPlatform/compute-gpu-installation#25; crhy/spaced#20",
        ("F03", "F04"),
        lambda _: (Repository(postinst=(MODULES, NO_HEADERS)),),
        lambda _: in_postinst("nvidia-kernel-open-dkms", "kernel headers for this kernel do not seem"),
        needs=("repository",),
    ),
    Fault(
        "postinst-fails",
        "the script with which a package is configured fails",
        "pop-os/pop#3811",
        ("F02", "F20", "F21"),
        fails,
        lambda injection: in_postinst(injection["package"], "post-installation step failed"),
        (
            Parameter("package", "which", "nvidia-persistenced", like=PACKAGE),
            Parameter("code", "exit code", "1", between=(1, 255)),
        ),
        needs=("repository",),
    ),
    Fault(
        "postinst-hangs",
        "the script with which a package is configured waits for something that never comes",
        "PierreBeucher/cloudypad#56",
        ("F02", "F20"),
        hangs,
        lambda injection: in_postinst(injection["package"], "waiting for what never comes"),
        (Parameter("package", "which", "nvidia-persistenced", like=PACKAGE),),
        needs=("repository",),
    ),
    Fault(
        "apt-lock",
        "another package manager is at work and holds the lock",
        "Azure/aks-engine#1538; skypilot-org/skypilot#554",
        ("F06",),
        lock_held,
        lambda _: Probe("dpkg --configure -a 2>&1 | grep -q 'frontend lock was locked'"),
        (Parameter("seconds", "how long, if it is not mended", "1800", between=(1, 86400)),),
    ),
    Fault(
        "driver-library-newer",
        "an unattended upgrade brought another driver, and the old module is still loaded",
        "lyulyul/shine-cluster#30; pando85/homelab#4110",
        ("F01",),
        library_newer,
        lambda _: Probe("nvidia-smi 2>&1 | grep -q 'Driver/library version mismatch'"),
        needs=("driver", "two versions"),
    ),
    Fault(
        "fabricmanager-mismatch",
        "a fabric manager of another version than the driver, which refuses to start",
        "NVIDIA/gpu-operator#544; Azure/azhpc-images#86",
        ("F10",),
        fabric_manager,
        lambda _: Probe(
            "test \"$(dpkg-query -W -f '${Version}' nvidia-fabricmanager)\" != "
            "\"$(dpkg-query -W -f '${Version}' libnvidia-ml1)\" && ! systemctl is-active -q nvidia-fabricmanager"
        ),
        needs=("driver", "fabric manager", "two versions"),
    ),
    Fault(
        "dpkg-interrupted",
        "dpkg was killed in the middle of a package",
        "pop-os/pop#3811; crhy/spaced#20",
        ("F20",),
        interrupted,
        lambda injection: Probe(f"dpkg --audit | grep -q {injection.quoted('package')}"),
        (
            Parameter("package", "of which", "nvidia-persistenced", like=PACKAGE),
            Parameter("stage", "what dpkg leaves behind; `any` is drawn with the seed", "any", among=("any", *STAGES)),
        ),
        needs=("repository",),
    ),
)
