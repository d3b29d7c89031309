"""Which way NCCL really took, and what fi_info, ibstat and perftest say: on texts in the formats of these programs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from plugins.filter.fabric import FilterModule as FabricFilters
from plugins.module_utils.fabric import (
    Endpoint,
    Expected,
    Port,
    Run,
    judge_bandwidth,
    judge_efa,
    judge_infiniband,
    judge_run,
    read_bandwidth,
    read_fi_info,
    read_ibstat,
    read_nccl,
    slower,
    way_to_gpus,
)
from plugins.modules import infiniband_bandwidth, nccl_all_reduce

# --- NCCL ------------------------------------------------------------------------------------------------------------

HEAD = """\
a:188:188 [0] NCCL INFO Bootstrap: Using eth0:10.0.4.51<0>
a:188:188 [0] NCCL INFO NCCL version 2.27.3+cuda12.9
"""
INSIDE = """\
a:188:585 [0] NCCL INFO comm 0x8b6b550 rank 0 nRanks 4 nNodes 2 localRanks 2 localRank 0 MNNVL 0
a:188:585 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
b:190:590 [1] NCCL INFO Channel 00/0 : 2[0] -> 3[1] via P2P/CUMEM/read
"""
EFA = (
    HEAD
    + """\
a:188:585 [0] NCCL INFO NET/Plugin: Loaded net plugin Libfabric (v10)
a:188:585 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.16.2
a:188:585 [0] NCCL INFO NET/OFI Setting provider_filter to efa
a:188:585 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 16 nics)
a:188:585 [0] NCCL INFO Using network Libfabric
"""
    + INSIDE
    + """\
a:188:585 [0] NCCL INFO Channel 00/0 : 3[1] -> 0[0] [receive] via NET/Libfabric/0/GDRDMA
a:189:586 [1] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [send] via NET/Libfabric/4(0)/GDRDMA/Shared
"""
)
OLD_EFA = """\
[1,0]<stdout>:w-0:21:21 [0] NCCL INFO NET/OFI Using aws-ofi-nccl 1.5.0aws
[1,0]<stdout>:w-0:21:21 [0] NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)
[1,0]<stdout>:w-0:21:21 [0] NCCL INFO Using network AWS Libfabric
[1,0]<stdout>:w-0:21:30 [0] NCCL INFO Channel 00 : 1[101c0] -> 0[101c0] [receive] via NET/AWS Libfabric/1/GDRDMA
"""
INFINIBAND = (
    HEAD
    + """\
a:7:7 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.4.51<0>
a:7:7 [0] NCCL INFO Using network IB
"""
    + INSIDE
    + """\
a:7:8 [0] NCCL INFO Channel 00/0 : 3[1] -> 0[0] [receive] via NET/IB/0/GDRDMA
a:7:9 [1] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [send] via NET/IB/1(0)/GDRDMA
"""
)
# As a node logs that has the plugin and cannot load its libfabric: no line of it is an error to NCCL.
FELL_BACK = (
    HEAD
    + """\
a:1:2 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so
a:1:2 [0] NCCL INFO NET/IB : No device found.
a:1:2 [0] NCCL INFO NET/IB : Using [RO]; OOB eth0:10.0.4.51<0>
a:1:2 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.4.51<0>
a:1:2 [0] NCCL INFO Using network Socket
"""
    + INSIDE
    + """\
a:1:2 [0] NCCL INFO Channel 00/0 : 3[1] -> 0[0] [receive] via NET/Socket/0
a:1:3 [1] NCCL INFO Channel 00/0 : 1[1] -> 2[0] [send] via NET/Socket/0
"""
)
NODES = {0: "a", 1: "a", 2: "b", 3: "b"}
P5EN = Expected("efa", ports=16, gbps=200, gpu_direct=True, nvlink=True, busbw_gb_s=431, source="Azure")
NDR = Expected("infiniband", ports=8, gbps=400, gpu_direct=True, nvlink=True)


def run(text: str, **more: object) -> Run:
    return Run(gpus=NODES, log=read_nccl(text), **more)  # type: ignore[arg-type]


def test_a_log_is_read_for_what_each_connection_goes_by() -> None:
    log = read_nccl(EFA)
    assert (log.version, log.ranks, log.networks) == ("2.27.3", 4, ("Libfabric",))
    assert log.providers == (("efa", "efa-direct", 16),)
    assert [(hop.sender, hop.receiver, hop.way, hop.gpu_direct) for hop in log.hops] == [
        (0, 1, "P2P", False),
        (2, 3, "P2P", False),
        (3, 0, "NET/Libfabric", True),
        (1, 2, "NET/Libfabric", True),
    ]
    assert read_nccl(FELL_BACK).reasons == ("NET/Plugin: Could not find: libnccl-net.so", "NET/IB : No device found.")


def test_an_older_log_is_read_too() -> None:
    log = read_nccl(OLD_EFA)
    assert log.providers == (("efa", "", 4),)
    assert [(hop.way, hop.gpu_direct) for hop in log.hops] == [("NET/AWS Libfabric", True)]
    old = "a:1:2 [0] NCCL INFO Channel 00 : 0[3000] -> 1[44000] via direct shared memory"
    assert [hop.way for hop in read_nccl(old).hops] == ["SHM"]


@pytest.mark.parametrize(("text", "expected"), [(EFA, P5EN), (INFINIBAND, NDR), (FELL_BACK, Expected())])
def test_the_way_that_the_fleet_has_is_no_finding(text: str, expected: Expected) -> None:
    assert judge_run(run(text), expected) == []


def test_a_plugin_of_hpcx_is_infiniband() -> None:
    assert judge_run(run(INFINIBAND.replace("via NET/IB/", "via NET/IBext_v8/")), NDR) == []


STAGED = INFINIBAND.replace("/GDRDMA", "") + (
    "a:7:7 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 0 'mlx5_0'\n"
)
SHARED = EFA.replace("via P2P/CUMEM/read", "via SHM/direct/direct")
FAILED = EFA.replace(
    "Selected provider is efa, fabric is efa-direct", "Selected provider is tcp, fabric is 10.0.0.0/16"
)
JUDGED = {
    "TCP where there is EFA": (
        FELL_BACK,
        P5EN,
        "FABRIC-FALLBACK",
        "2 of 2 connections between nodes go via NET/Socket",
    ),
    "and why": (FELL_BACK, P5EN, "FABRIC-FALLBACK", "NCCL says: NET/Plugin: Could not find: libnccl-net.so"),
    "TCP where there is InfiniBand": (FELL_BACK, NDR, "FABRIC-FALLBACK", "not over infiniband"),
    "one connection astray": (EFA.replace("Libfabric/0/GDRDMA", "Socket/0"), P5EN, "FABRIC-FALLBACK", "1 of 2"),
    "RoCE's plugin where there is EFA": (INFINIBAND, P5EN, "FABRIC-FALLBACK", "via NET/IB"),
    "libfabric over TCP": (FAILED, P5EN, "FABRIC-PROVIDER", "libfabric chose tcp"),
    "through the host's memory": (STAGED, NDR, "FABRIC-STAGED", "GPU Direct RDMA Disabled for HCA 0 'mlx5_0'"),
    "shared memory where there is NVLink": (
        SHARED,
        P5EN,
        "FABRIC-NO-NVLINK",
        "2 of 2 connections inside a node go via SHM",
    ),
    "a card that is missing": (EFA.replace("found 16", "found 15"), P5EN, "FABRIC-CARDS", "found 15 cards"),
    "a log that says nothing": (HEAD, P5EN, "FABRIC-UNSEEN", "NCCL_DEBUG"),
    "nothing of what is between the nodes": (HEAD + INSIDE, P5EN, "FABRIC-UNSEEN", "between the nodes"),
}


@pytest.mark.parametrize(("text", "expected", "rule", "said"), JUDGED.values(), ids=JUDGED)
def test_a_slower_way_is_a_finding_and_never_a_silent_one(text: str, expected: Expected, rule: str, said: str) -> None:
    found = judge_run(run(text), expected)
    assert [finding.split(": ")[0] for finding in found] == [rule]
    assert said in found[0]


def test_host_memory_is_no_finding_where_cards_do_not_reach_the_gpus() -> None:
    assert judge_run(run(STAGED), replace(NDR, gpu_direct=False)) == []


def test_wrong_sums_and_a_run_that_broke_off_are_findings() -> None:
    (wrong,) = judge_run(run(EFA, kept=False), P5EN)
    assert wrong.startswith("FABRIC-WRONG: ")
    warned = FELL_BACK + "a:1:2 [0] int init():352 NCCL WARN NET/OFI aws-ofi-nccl initialization failed\n"
    (broken,) = judge_run(run(warned, error="rank 1 ended with 1"), P5EN)
    assert broken.startswith("FABRIC-RUN: the all-reduce did not end: rank 1 ended with 1. NCCL says: ")
    assert "aws-ofi-nccl initialization failed" in broken


def test_inside_a_node_the_bandwidth_is_held_against_what_others_accept() -> None:
    alone = Run(gpus={0: "a", 1: "a"}, log=read_nccl(HEAD + INSIDE), busbw_gb_s=430.9)
    (slow,) = judge_run(alone, P5EN)
    assert slow.startswith("FABRIC-SLOW: 430.9 GB/s inside a node, and 431 is the least (Azure)")
    assert judge_run(replace(alone, busbw_gb_s=431), P5EN) == []
    assert judge_run(run(EFA, busbw_gb_s=1), P5EN) == [], "between nodes there is no such figure"


def test_one_gpu_has_no_way_to_go() -> None:
    assert judge_run(Run(gpus={0: "a"}, log=read_nccl(HEAD)), Expected()) == []


def test_a_bandwidth_below_that_of_the_first_run_is_a_finding() -> None:
    assert slower("a and b", 80, 100) == []
    assert slower("a and b", 80, 0) == []
    (told,) = slower("a and b", 79.9, 100)
    assert told.startswith("FABRIC-SLOWER: 79.9 GB/s between a and b, and it had 100.")


# --- fi_info ---------------------------------------------------------------------------------------------------------

FI_INFO = """\
provider: efa
    fabric: efa-direct
    domain: rdmap47s0-rdm
    version: 201.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: efa
    domain: rdmap47s0-rdm
    version: 201.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: efa
    domain: rdmap47s0-dgrm
    version: 201.0
    type: FI_EP_DGRAM
    protocol: FI_PROTO_EFA
"""


def test_each_device_counts_once_however_often_it_is_listed() -> None:
    endpoints = read_fi_info(FI_INFO)
    assert endpoints[0] == Endpoint("efa", "efa-direct", "rdmap47s0-rdm", "FI_EP_RDM")
    assert judge_efa(endpoints, Expected("efa", ports=1)) == []
    (few,) = judge_efa(endpoints, Expected("efa", ports=2))
    assert few == "EFA-CARDS: libfabric finds 1 EFA devices (rdmap47s0-rdm), and the node has 2"


@pytest.mark.parametrize(
    "text", ["", "fi_getinfo: -61 (No data available)\n", FI_INFO.replace("provider: efa", "provider: tcp")]
)
def test_no_device_is_told_as_none(text: str) -> None:
    (told,) = judge_efa(read_fi_info(text), Expected("efa", ports=1))
    assert told.startswith("EFA-NONE: ")


# --- ibstat ----------------------------------------------------------------------------------------------------------

IBSTAT = """\
CA 'mlx5_0'
\tCA type: MT4129
\tNumber of ports: 1
\tFirmware version: 28.39.1002
\tHardware version: 0
\tNode GUID: 0xa088c2030088a8c6
\tSystem image GUID: 0xa088c2030088a8c6
\tPort 1:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 400
\t\tBase lid: 12
\t\tLMC: 0
\t\tSM lid: 1
\t\tCapability mask: 0xa751e848
\t\tPort GUID: 0xa088c2030088a8c6
\t\tLink layer: InfiniBand
CA 'mlx5_1'
\tCA type: MT4129
\tNumber of ports: 1
\tFirmware version: 28.39.1002
\tPort 1:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 100
\t\tBase lid: 0
\t\tSM lid: 0
\t\tLink layer: Ethernet
"""
ONE = Expected("infiniband", ports=1, gbps=400)


def test_ports_are_read_with_their_adapter() -> None:
    assert read_ibstat(IBSTAT) == [
        Port("mlx5_0", 1, "Active", "LinkUp", 400, "InfiniBand", 1),
        Port("mlx5_1", 1, "Active", "LinkUp", 100, "Ethernet", 0),
    ]
    assert read_ibstat("") == []
    assert judge_infiniband(read_ibstat(IBSTAT), ONE) == []


IB_JUDGED = {
    "a port that is not cabled": (IBSTAT, 2, "INFINIBAND-PORTS: 1 of 2 ports are up with 400 Gbit/s"),
    "no link": (
        IBSTAT.replace("LinkUp", "Polling").replace("Active", "Down"),
        1,
        "mlx5_0 port 1 has no link (Polling)",
    ),
    "no subnet manager": (
        IBSTAT.replace("State: Active", "State: Initializing").replace("SM lid: 1", "SM lid: 0"),
        1,
        "mlx5_0 port 1 is Initializing, with no subnet manager",
    ),
    "a manager that does nothing": (
        IBSTAT.replace("State: Active", "State: Initializing"),
        1,
        "is Initializing, with the subnet manager at lid 1",
    ),
    "half the rate": (IBSTAT.replace("Rate: 400", "Rate: 200"), 1, "mlx5_0 port 1 has 200 Gbit/s"),
    "Ethernet alone": (IBSTAT.replace("InfiniBand", "Ethernet"), 1, "there are Ethernet ports alone"),
    "nothing": ("", 1, "there is no adapter"),
}


@pytest.mark.parametrize(("text", "ports", "said"), IB_JUDGED.values(), ids=IB_JUDGED)
def test_a_port_that_is_not_up_is_told_with_where_to_look(text: str, ports: int, said: str) -> None:
    (told,) = judge_infiniband(read_ibstat(text), replace(ONE, ports=ports))
    assert told.startswith("INFINIBAND-PORTS: ")
    assert said in told


# --- perftest --------------------------------------------------------------------------------------------------------

IB_WRITE_BW = """\
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF\t\tDevice         : mlx5_0
 Number of qps   : 1\t\tTransport type : IB
 Link type       : IB
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 65536      5000             392.50             392.47\t\t   0.748577
---------------------------------------------------------------------------------------
"""


def test_the_bandwidth_of_two_ports_is_held_against_what_others_accept() -> None:
    assert read_bandwidth(IB_WRITE_BW) == 392.47
    assert judge_bandwidth("a and b", 392.47, ONE) == []
    (slow,) = judge_bandwidth("a and b", 359, ONE)
    assert slow.startswith(
        "FABRIC-SLOW: 359 Gbit/s between a and b, and 360 is the least (Azure/azurehpc-health-checks"
    )
    assert judge_bandwidth("a and b", 359, replace(ONE, gbps=200)) == []
    assert judge_bandwidth("a and b", 1, replace(ONE, gbps=800)) == [], "no figure is known to hold it against"
    assert read_bandwidth("Couldn't connect to b:18515\n") is None
    (none,) = judge_bandwidth("a and b", None, ONE)
    assert none.startswith("FABRIC-PERFTEST: ")


@pytest.mark.parametrize(
    ("peer_memory", "kernel_modules", "kernel", "way"),
    [
        (False, "open", "6.1.170", "dma-buf"),
        (False, "open", "5.10.0", ""),
        (False, "proprietary", "6.1.170", ""),
        (True, "proprietary", "6.1.170", "peermem"),
        (True, "open", "5.10.0", "peermem"),
    ],
)
def test_how_an_adapter_reaches_the_memory_of_gpus(
    peer_memory: bool, kernel_modules: str, kernel: str, way: str
) -> None:
    assert way_to_gpus(peer_memory, kernel_modules, kernel) == way


# --- a run -----------------------------------------------------------------------------------------------------------

FAKE_PYTHON = """\
#!/bin/sh
# Stands for an engine's Python: says what a process of an all-reduce would, and logs what NCCL would.
log=$(dirname "$NCCL_DEBUG_FILE")/nccl.a.$RANK
echo 'a:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM' >"$log"
[ "$RANK" = "{fails}" ] && echo "no memory" >&2 && exit 3
[ "{sleeps}" = yes ] && sleep 60
echo '{{"kept": true, "busbw": {{"64": 300.5, "1024": 480.0}}}}'
"""


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    return {
        "python": str(tmp_path / "python"),
        "gpus": 2,
        "first_rank": 0,
        "ranks": 2,
        "address": "127.0.0.1",
        "port": 1,
        "mib": [64, 1024],
        "repeats": 1,
        "seconds": 20,
    }


def engine(asked: dict[str, Any], fails: str = "none", sleeps: str = "no") -> dict[str, Any]:
    python = Path(asked["python"])
    python.write_text(FAKE_PYTHON.format(fails=fails, sleeps=sleeps))
    python.chmod(0o755)
    folder = python.parent / "run"
    folder.mkdir()
    return nccl_all_reduce.take_part(asked, folder)


def test_a_process_is_started_for_each_gpu_and_all_logs_are_read(asked: dict[str, Any]) -> None:
    told = engine(asked)
    assert (told["error"], told["kept"], told["busbw_gb_s"]) == ("", True, {"64": 300.5, "1024": 480.0})
    assert len(told["log"]["hops"]) == 2


def test_a_process_that_fails_ends_the_others_and_is_told(asked: dict[str, Any]) -> None:
    began = time.monotonic()
    assert engine(asked, fails="1", sleeps="yes")["error"] == "the process of GPU 1 ended with 3: no memory"
    assert time.monotonic() - began < 15


def test_a_run_that_does_not_end_is_ended(asked: dict[str, Any]) -> None:
    assert "did not end in 1 s" in engine({**asked, "seconds": 1}, sleeps="yes")["error"]


def test_the_program_is_python() -> None:
    compile(nccl_all_reduce.PROGRAM, "all_reduce.py", "exec")


def part(text: str, busbw: dict[str, float], error: str = "") -> dict[str, Any]:
    # As Ansible hands it over: lists for tuples.
    log = json.loads(json.dumps(asdict(read_nccl(text))))
    return {"error": error, "kept": True, "busbw_gb_s": busbw, "log": log}


def between(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"a": {"nvidia_driver_gpu_count": 2, "seen": one}, "b": {"nvidia_driver_gpu_count": "2", "seen": other}}


def test_the_parts_of_all_nodes_are_judged_as_one_run() -> None:
    filters = FabricFilters().filters()
    expected = asdict(P5EN)
    hostvars = between(part(EFA, {"64": 70.0, "1024": 90.5}), part(FELL_BACK, {}))
    found = filters["fabric_findings"](["a", "b"], hostvars, "seen", expected)
    assert [finding.split(": ")[0] for finding in found] == ["FABRIC-FALLBACK"]
    assert filters["fabric_busbw"](["a", "b"], hostvars, "seen") == 90.5
    well = between(part(EFA, {"1024": 90.5}), part(EFA, {}))
    assert filters["fabric_findings"](["a", "b"], well, "seen", expected, 100) == []
    (slow,) = filters["fabric_findings"](["a", "b"], well, "seen", expected, 120)
    assert slow.startswith("FABRIC-SLOWER: 90.5 GB/s between a and b")


def test_a_node_that_was_refused_or_not_reached_is_no_healthy_run() -> None:
    findings = FabricFilters().filters()["fabric_findings"]
    hostvars = between(part(EFA, {"1024": 90.5}), {"failed": True, "msg": "FABRIC-BUSY: GPUs of this node are in use"})
    (told,) = findings(["a", "b"], hostvars, "seen", asdict(P5EN))
    assert "b: FABRIC-BUSY: GPUs of this node are in use" in told
    hostvars["b"].pop("seen")
    (told,) = findings(["a", "b"], hostvars, "seen", asdict(P5EN))
    assert "b: not reached" in told


PERFTEST = """\
#!/bin/sh
# As ib_write_bw: waits without an address, and writes with one, to a neighbour that comes a little later.
case "$*" in
  *10.0.0.2) [ -e "{folder}/came" ] && echo " 65536 5000 392.5 391.2 0.7"; touch "{folder}/came" ;;
  *) sleep {waits} ;;
esac
"""


def perftest(folder: Path, monkeypatch: pytest.MonkeyPatch, waits: int, seconds: int) -> dict[str, float | None]:
    program = folder / "ib_write_bw"
    program.write_text(PERFTEST.format(folder=folder, waits=waits))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    ports = [{"adapter": "mlx5_0", "number": 1}, {"adapter": "mlx5_1", "number": 1}]
    return infiniband_bandwidth.measured(ports, "10.0.0.2", 29700, seconds)


def test_each_port_is_measured_also_where_the_neighbour_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert perftest(tmp_path, monkeypatch, 0, 20) == {"mlx5_0/1": 391.2, "mlx5_1/1": 391.2}


def test_a_neighbour_that_never_comes_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    assert perftest(tmp_path, monkeypatch, 60, 3) == {"mlx5_0/1": 391.2, "mlx5_1/1": 391.2}
    assert time.monotonic() - began < 15
