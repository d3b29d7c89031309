#!/usr/bin/python
"""This node's part of an all-reduce over GPUs, with the NCCL that serves on it, and what its log says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpuyard.fleet.plugins.module_utils.fabric import read_nccl

DOCUMENTATION = r"""
module: nccl_all_reduce
short_description: Take part in an all-reduce over the GPUs of one or more nodes
description:
  - Starts one process for each GPU with the Python of an engine, whose PyTorch and NCCL are those that serve. All
    nodes that take part have to be started within O(seconds).
  - The sums are compared, the bus bandwidth is reckoned as nccl-tests does, and NCCL's log is read for the way that
    each connection took. No MPI and no nccl-tests are needed.
  - Refused while a program uses a GPU of the node.
options:
  python:
    description: Python of the engine's environment.
    type: path
    required: true
  gpus:
    description: How many GPUs of this node take part.
    type: int
    required: true
  first_rank:
    description: Rank of this node's first GPU.
    type: int
    default: 0
  ranks:
    description: How many GPUs take part, of all nodes together.
    type: int
    required: true
  address:
    description: Address of the node with rank 0.
    type: str
    default: 127.0.0.1
  port:
    description: A port of that node.
    type: int
    required: true
  mib:
    description: Sizes of the tensor, in MiB.
    type: list
    elements: int
    default: [64, 1024]
  repeats:
    description: How often each size is reduced. The best of all counts.
    type: int
    default: 5
  seconds:
    description: How long all of it may take.
    type: int
    default: 300
author: [gpuyard]
attributes:
  check_mode: {support: none, description: It would only be said that GPUs are kept busy.}
"""

EXAMPLES = r"""
- name: Reduce over the eight GPUs of a node
  gpuyard.fleet.nccl_all_reduce:
    python: /opt/vllm/vllm-0.32.0-5e70a78b282b/bin/python
    gpus: 8
    ranks: 8
    port: 29555
"""

RETURN = r"""
error:
  description: Why it did not end, or nothing.
  returned: success
  type: str
busbw_gb_s:
  description: Bus bandwidth by size in MiB, in GB/s, of the node with rank 0.
  returned: success
  type: dict
kept:
  description: Whether the sums were right on every GPU of this node.
  returned: success
  type: bool
log:
  description: What NCCL's log says of the ways that were taken.
  returned: success
  type: dict
"""

# Zeros are reduced for the time: sums of anything else would grow with each repetition.
PROGRAM = r"""
import datetime, json, os, sys, time
import torch, torch.distributed as dist

rank, ranks, gpu = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
sizes, repeats, seconds = json.loads(sys.argv[1])
torch.cuda.set_device(gpu)
dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=seconds), device_id=torch.device("cuda", gpu))
ones = torch.full((1 << 20,), float(rank + 1), device="cuda")
dist.all_reduce(ones)
kept = bool((ones == ranks * (ranks + 1) / 2).all())
busbw = {}
for mib in sizes:
    zeros = torch.zeros(mib << 18, device="cuda")
    best = float("inf")
    for _ in range(repeats + 1):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(zeros)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    busbw[mib] = round((mib << 20) / best * 2 * (ranks - 1) / ranks / 1e9, 1)
    del zeros
dist.barrier()
dist.destroy_process_group()
print(json.dumps({"kept": kept, "busbw": busbw}))
"""


def busy() -> str:
    """Programs on the GPUs of this node, or nothing."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as wrong:
        return f"nvidia-smi cannot tell ({wrong})"
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else done.stdout.strip()


def take_part(params: dict, folder: Path) -> dict:
    """Start a process for each GPU and wait for all; the first that fails ends the others."""
    program = folder / "all_reduce.py"
    program.write_text(PROGRAM)
    asked = json.dumps([params["mib"], params["repeats"], params["seconds"]])
    base = {
        **os.environ,
        "WORLD_SIZE": str(params["ranks"]),
        "MASTER_ADDR": params["address"],
        "MASTER_PORT": str(params["port"]),
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET",
        "NCCL_DEBUG_FILE": str(folder / "nccl.%h.%p"),
    }
    processes = []
    for gpu in range(params["gpus"]):
        own = {**base, "RANK": str(params["first_rank"] + gpu), "LOCAL_RANK": str(gpu)}
        with (folder / f"out.{gpu}").open("w") as out, (folder / f"err.{gpu}").open("w") as err:
            words = [params["python"], "-I", str(program), asked]
            # In sessions of their own, so that what they start ends with them.
            processes.append(subprocess.Popen(words, stdout=out, stderr=err, env=own, start_new_session=True))
    error = awaited(processes, params["seconds"], folder)
    log = "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("nccl.*")))
    said = [] if error else [json.loads((folder / f"out.{gpu}").read_text()) for gpu in range(params["gpus"])]
    return {
        "error": error,
        "busbw_gb_s": said[0]["busbw"] if said and params["first_rank"] == 0 else {},
        "kept": all(one["kept"] for one in said),
        "log": asdict(read_nccl(log)),
    }


def awaited(processes: list, seconds: int, folder: Path) -> str:
    """Why not all of them ended well, or nothing."""
    deadline = time.monotonic() + seconds
    try:
        while True:
            codes = [process.poll() for process in processes]
            for gpu, code in enumerate(codes):
                if code:
                    last = (folder / f"err.{gpu}").read_text(errors="replace").strip().splitlines()[-1:]
                    return f"the process of GPU {gpu} ended with {code}: {' '.join(last)}"
            if None not in codes:
                return ""
            if time.monotonic() > deadline:
                return f"it did not end in {seconds} s; do all nodes take part, and can they reach each other?"
            time.sleep(0.2)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "python": {"type": "path", "required": True},
            "gpus": {"type": "int", "required": True},
            "first_rank": {"type": "int", "default": 0},
            "ranks": {"type": "int", "required": True},
            "address": {"type": "str", "default": "127.0.0.1"},
            "port": {"type": "int", "required": True},
            "mib": {"type": "list", "elements": "int", "default": [64, 1024]},
            "repeats": {"type": "int", "default": 5},
            "seconds": {"type": "int", "default": 300},
        },
    )
    if not Path(module.params["python"]).exists():
        module.fail_json(msg=f"FABRIC-ENGINE: there is no {module.params['python']}. Converge the node first")
    if programs := busy():
        module.fail_json(
            msg=f"FABRIC-BUSY: GPUs of this node are in use: {programs}. Drain it, and stop its engines: the figures "
            "would be wrong, and there may be no memory left"
        )
    folder = Path(tempfile.mkdtemp(prefix="gpuyard-fabric-"))
    try:
        module.exit_json(changed=False, **take_part(module.params, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
