#!/usr/bin/python3
"""Twenty things that a service has no business doing, tried from inside its own sandbox.

    probes.py trial UNIT --directory DIRECTORY [--node HOST:PORT --outward HOST:PORT] [--setting NAME=VALUE]...

Run as root on the node of the unit. It makes two more units: one is the installed unit word for word, with only what it
starts replaced by this program; the other has no setting at all. What both could do is printed as one JSON document.
A probe that is denied in the first proves something only because it is open in the second. Nothing is changed for good:
what is planted is taken away again, and a probe that opens a door does not go through it.

Needs Python 3.9 or later and its standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

WORK = Path("/run/gpuyard-probe")
UNITS = Path("/run/systemd/system")
SECRET = "gpuyard-probe-secret"
NEIGHBOUR = "gpuyard-probe-neighbour.service"
METADATA = "169.254.169.254"
# The planted things: each lies where only one directive of the sandbox keeps it from the service's own account.
HOME = Path("/home/gpuyard-probe")
TEMPORARY = Path("/tmp/gpuyard-probe")
PROGRAM = Path("/usr/local/lib/gpuyard-probe-id")
DISK = Path("/dev/gpuyard-probe-disk")

REFUSED = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EAFNOSUPPORT, errno.ETIMEDOUT)
CONTROL_GROUPS = Path("/sys/fs/cgroup")
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
FINIT_MODULE, PTRACE_SEIZE, MNT_DETACH, SYSLOG_READ_ALL, ADJ_TICK = 313, 0x4206, 2, 3, 0x4000

libc = ctypes.CDLL(None, use_errno=True)


def called(result: int) -> int:
    """The result of a call of the C library, or its error as Python would raise it."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- the probes ------------------------------------------------------------------------------------------------------
# Each returns in a few words what it could do, or raises the error that kept it from it.


def read_the_password_hashes(_: dict) -> str:
    return f"{len(Path('/etc/shadow').read_text().splitlines())} accounts"


def read_the_key_of_another_service(_: dict) -> str:
    return Path("/run/credentials", NEIGHBOUR, "secret").read_text()


def read_the_environment_of_another_service(plan: dict) -> str:
    text = Path(f"/proc/{plan['neighbour']}/environ").read_text()
    return re.search(rf"WORD={SECRET}", text).group()


def read_a_home(_: dict) -> str:
    return (HOME / "secret").read_text()


def read_the_temporary_file_of_another_service(_: dict) -> str:
    return (TEMPORARY / "secret").read_text()


def write_a_program(_: dict) -> str:
    return touched(Path("/usr/local/bin/gpuyard-probe"))


def write_the_directory_of_another_service(plan: dict) -> str:
    return touched(Path(plan["directory"]) / "probe")


def write_a_kernel_setting(_: dict) -> str:
    path = Path("/proc/sys/net/ipv4/ip_forward")
    path.write_text(path.read_text())  # the value that it has
    return f"wrote {path}"


def make_a_control_group(_: dict) -> str:
    group = CONTROL_GROUPS / "gpuyard-probe"
    group.mkdir()
    group.rmdir()
    return f"made {group}"


def load_a_kernel_module(_: dict) -> str:
    """Handed no module, the kernel refuses this one too, but it is the kernel that was asked."""
    try:
        called(libc.syscall(FINIT_MODULE, -1, b"", 0))
    except OSError as error:
        if error.errno in REFUSED:
            raise
        return f"the kernel was asked, and said: {error.strerror}"
    return "loaded"


def trace_another_service(plan: dict) -> str:
    """Seized, it goes on running; when this program ends it is let go."""
    called(libc.ptrace(PTRACE_SEIZE, plan["neighbour"], None, None))
    return f"traces process {plan['neighbour']}"


def mount_a_filesystem(_: dict) -> str:
    with tempfile.TemporaryDirectory() as folder:
        called(libc.mount(b"none", folder.encode(), b"tmpfs", 0, None))
        libc.umount2(folder.encode(), MNT_DETACH)
    return "mounted a tmpfs"


def open_a_namespace(_: dict) -> str:
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0 else ctypes.get_errno())
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, os.strerror(number))
    return "user and mount namespace"


def open_a_raw_socket(_: dict) -> str:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return "ICMP"


def open_a_packet_socket(_: dict) -> str:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    return "Ethernet"


def open_a_disk(plan: dict) -> str:
    """By a device file that belongs to the service's account, or by one that it makes itself."""
    try:
        os.close(os.open(DISK, os.O_RDONLY))
        return f"opened {DISK}"
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "disk"
            os.mknod(own, 0o600 | 0o060000, os.makedev(*plan["disk"]))
            os.close(os.open(own, os.O_RDONLY))
            return "made a device file and opened it"


def become_root(_: dict) -> str:
    """By a program that belongs to root and says so when it runs. Root tries it as nobody."""
    account = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run([PROGRAM, "-u"], stdout=subprocess.PIPE, check=True, timeout=10, text=True, **account)
    if done.stdout.strip() != "0":
        raise OSError(errno.EPERM, f"the program runs as {done.stdout.strip()}")
    return "runs as root"


def read_the_kernel_log(_: dict) -> str:
    buffer = ctypes.create_string_buffer(1 << 16)
    return f"{called(libc.klogctl(SYSLOG_READ_ALL, buffer, len(buffer)))} bytes"


def set_the_clock(_: dict) -> str:
    class Clock(ctypes.Structure):
        """struct timex; what stands before and after the length of a tick is of no interest here."""

        _fields_ = (("modes", ctypes.c_uint), ("before", ctypes.c_long * 10), ("tick", ctypes.c_long))
        _fields_ += (("after", ctypes.c_long * 20),)

    clock = Clock()
    called(libc.adjtimex(ctypes.byref(clock)))
    clock.modes = ADJ_TICK  # to the length that it has
    called(libc.adjtimex(ctypes.byref(clock)))
    return f"tick of {clock.tick} µs"


def reach_the_metadata_service(_: dict) -> str:
    return connected(METADATA, 80)


def reach_another_node(plan: dict) -> str:
    return connected(*plan["node"])


def reach_the_world_outside(plan: dict) -> str:
    return connected(*plan["outward"])


COMMON: list[Callable[[dict], str]] = [
    read_the_password_hashes,
    read_the_key_of_another_service,
    read_the_environment_of_another_service,
    read_a_home,
    write_a_program,
    write_the_directory_of_another_service,
    write_a_kernel_setting,
    load_a_kernel_module,
    trace_another_service,
    mount_a_filesystem,
    open_a_namespace,
    open_a_raw_socket,
    open_a_packet_socket,
    open_a_disk,
    become_root,
    read_the_kernel_log,
    set_the_clock,
    reach_the_metadata_service,
]
# A gateway talks to other machines by trade. It is asked two other things instead.
OF_AN_ENGINE = [*COMMON, reach_another_node, reach_the_world_outside]
OF_A_GATEWAY = [*COMMON, read_the_temporary_file_of_another_service, make_a_control_group]


def touched(path: Path) -> str:
    path.write_text("")
    path.unlink()
    return f"wrote {path}"


def connected(host: str, port: int) -> str:
    with socket.create_connection((host, port), timeout=2):
        return f"connected to {host}:{port}"


def tried(probe: Callable[[dict], str], plan: dict) -> dict:
    """`unclear` is an error that no sandbox gives: then the probe itself is at fault and proves nothing."""
    try:
        outcome = {"result": "open", "detail": probe(plan)}
    except socket.timeout:  # noqa: UP041 - the same as TimeoutError only from Python 3.10
        outcome = {"result": "denied", "detail": "no answer"}
    except OSError as error:
        outcome = {"result": "denied" if error.errno in REFUSED else "unclear", "detail": str(error.strerror)}
    except Exception as error:
        outcome = {"result": "unclear", "detail": repr(error)}
    return {"probe": probe.__name__.replace("_", " "), **outcome}


def inside() -> None:
    plan = json.loads((WORK / "plan.json").read_text())
    probes = OF_AN_ENGINE if plan["node"] else OF_A_GATEWAY
    print(json.dumps({"uid": os.getuid(), "probes": [tried(probe, plan) for probe in probes]}))


# --- the trial -------------------------------------------------------------------------------------------------------


def systemctl(*words: str) -> str:
    return subprocess.run(
        ["systemctl", "--no-pager", *words], stdout=subprocess.PIPE, check=True, text=True, timeout=120
    ).stdout


def shown(unit: str, name: str) -> str:
    return systemctl("show", unit, f"--property={name}", "--value").strip()


def exposure(unit: str) -> float:
    told = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", unit], stdout=subprocess.PIPE, check=True, text=True, timeout=60
    ).stdout
    return float(re.findall(r"exposure level for .*: ([0-9.]+)", told)[-1])


def copy_of(text: str, output: Path, settings: Sequence[str] = ()) -> str:
    """A unit as `systemctl cat` shows it, that runs the probes once instead of what it runs."""
    kept, section = [], ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line
        if section != "[Install]" and not re.match(r"(Exec\w+|Type|Restart)\s*=", line):
            kept.append(line)
    settings = ["RuntimeDirectoryPreserve=yes", *settings]  # the folder is the live service's too
    return "\n".join(kept) + once(output) + "\n".join(settings) + "\n"


def once(output: Path) -> str:
    return (
        "\n[Service]\nType=oneshot\nRestart=no\nTimeoutStartSec=60\n"
        f"ExecStart={sys.executable} {WORK}/probes.py inside\nStandardOutput=file:{output}\n"
    )


@contextlib.contextmanager
def planted(user: str, plan: dict) -> Iterator[None]:
    directory = Path(plan["directory"])
    remove(directory)
    try:
        plant(pwd.getpwnam(user), directory, plan)
        with metadata_service():
            yield
    finally:
        remove(directory)


def plant(account: pwd.struct_passwd, directory: Path, plan: dict) -> None:
    """What there is to be had, all of it within reach of the service's account but for the sandbox."""
    WORK.mkdir(mode=0o755)
    WORK.chmod(0o755)
    shutil.copy(__file__, WORK / "probes.py")
    (WORK / "probes.py").chmod(0o644)
    secret = WORK / "secret"
    secret.touch(0o600)
    secret.write_text(SECRET)
    for folder in (HOME, TEMPORARY):
        folder.mkdir(mode=0o755)
        (folder / "secret").write_text(SECRET)
        (folder / "secret").chmod(0o644)
    shutil.copy("/usr/bin/id", PROGRAM)
    PROGRAM.chmod(0o4755)
    plan["disk"] = a_disk()
    directory.mkdir(mode=0o700)
    for path in (DISK, directory):
        os.chown(path, account.pw_uid, account.pw_gid)
    (UNITS / NEIGHBOUR).write_text(
        f"[Service]\nUser={account.pw_name}\nEnvironment=WORD={SECRET}\nLoadCredential=secret:{secret}\n"
        "ExecStart=/bin/sleep 600\n"
    )
    systemctl("daemon-reload")
    systemctl("start", NEIGHBOUR)
    plan["neighbour"] = int(shown(NEIGHBOUR, "MainPID"))
    (WORK / "plan.json").write_text(json.dumps(plan))


def remove(directory: Path) -> None:
    """All that a trial leaves, also of one that was killed."""
    subprocess.run(["systemctl", "stop", "gpuyard-probe*"], check=False, timeout=60)
    for path in (WORK, HOME, TEMPORARY, PROGRAM, DISK, *UNITS.glob("gpuyard-probe*"), directory):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    forget_the_metadata_service()
    systemctl("daemon-reload")
    subprocess.run(["systemctl", "reset-failed", "gpuyard-probe*"], check=False, timeout=60)


@contextlib.contextmanager
def metadata_service() -> Iterator[None]:
    """Where no cloud answers at the metadata address, this machine does, for the length of the trial."""
    with contextlib.suppress(OSError), socket.create_connection((METADATA, 80), timeout=2):
        yield
        return
    subprocess.run(["ip", "address", "add", f"{METADATA}/32", "dev", "lo"], check=True, timeout=10)
    try:
        with socket.create_server((METADATA, 80)) as server:
            threading.Thread(target=answer_all, args=(server,), daemon=True).start()
            yield
    finally:
        forget_the_metadata_service()


def answer_all(server: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed: the trial is over
        while True:
            server.accept()[0].close()


def forget_the_metadata_service() -> None:
    # An address of the loopback alone: a cloud's own is never there.
    subprocess.run(
        ["ip", "address", "delete", f"{METADATA}/32", "dev", "lo"], stderr=subprocess.DEVNULL, check=False, timeout=10
    )


def a_disk() -> list[int]:
    """The numbers of a block device that can be opened at all on this machine: a disk, or else a loop device."""
    rows = [line.split() for line in Path("/proc/partitions").read_text().splitlines()]
    for numbers in [[int(row[0]), int(row[1])] for row in rows if row and row[0].isdigit()] + [[7, 0]]:
        DISK.unlink(missing_ok=True)
        os.mknod(DISK, 0o600 | 0o060000, os.makedev(*numbers))
        with contextlib.suppress(OSError):
            os.close(os.open(DISK, os.O_RDONLY))
            return numbers
    raise SystemExit("there is no block device that root could open; the probe of it would prove nothing")


def address(text: str) -> list:
    host, _, port = text.rpartition(":")
    return [host, int(port)]


def trial(unit: str, directory: str, node: list | None, outward: list | None, setting: list[str]) -> dict:
    user = shown(unit, "User")
    # Of the same instance, so that what the unit says of its instance means the same.
    double = f"gpuyard-probe@{unit.partition('@')[2]}" if "@" in unit else "gpuyard-probe.service"
    bare = "gpuyard-probe-bare.service"
    plan = {"directory": directory, "node": node, "outward": outward}
    found: dict = {"unit": unit, "user": user, "account": pwd.getpwnam(user).pw_uid}
    with planted(user, plan):
        texts = {
            "sandboxed": (double, copy_of(systemctl("cat", unit), WORK / "sandboxed.json", setting)),
            "bare": (bare, once(WORK / "bare.json")),
        }
        for kind, (name, text) in texts.items():
            (UNITS / (f"{name.split('@')[0]}@.service" if "@" in name else name)).write_text(text)
            systemctl("daemon-reload")
            subprocess.run(["systemctl", "start", name], check=False, timeout=90)
            if shown(name, "Result") != "success":
                raise SystemExit(f"{name} did not run: {shown(name, 'Result')}, exit {shown(name, 'ExecMainStatus')}")
            found[kind] = {**json.loads((WORK / f"{kind}.json").read_text()), "exposure": exposure(name)}
        found["exposure"] = exposure(unit)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("inside")
    asked = verbs.add_parser("trial")
    asked.add_argument("unit")
    asked.add_argument("--directory", required=True)
    asked.add_argument("--node", type=address)
    asked.add_argument("--outward", type=address)
    asked.add_argument("--setting", action="append", default=[], help="tried in place of what the unit says")
    options = vars(parser.parse_args())
    if options.pop("verb") == "inside":
        inside()
    else:
        print(json.dumps(trial(**options)))


if __name__ == "__main__":
    main()
