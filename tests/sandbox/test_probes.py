"""The trial of a sandbox, as far as it can be tried without one. tests/e2e and tests/hardware try real units."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.sandbox import probes

UNIT = """\
# /etc/systemd/system/vllm@.service
[Unit]
Description=vLLM serving %i
[Service]
Type=exec
User=vllm
LoadCredential=api_key:/etc/vllm/credentials/%i.key
ExecStartPre=+/usr/bin/python3 /usr/local/lib/gpuyard/gpu_holders.py
ExecStart=/usr/local/lib/gpuyard/engine_run
Restart=always
RestartSec=5
PrivateDevices=yes
[Install]
WantedBy=multi-user.target

# /etc/systemd/system/vllm@tiny.service.d/gpuyard.conf
[Service]
IPAddressDeny=any
"""


def raising(error: Exception):
    def probe(_: dict) -> str:
        raise error

    return probe


def test_an_engine_and_a_gateway_are_asked_twenty_things_each() -> None:
    for asked in (probes.OF_AN_ENGINE, probes.OF_A_GATEWAY):
        assert len({probe.__name__ for probe in asked}) == 20


def test_the_double_of_a_unit_differs_in_what_it_starts_alone() -> None:
    text = probes.copy_of(UNIT, Path("/run/out.json"))
    kept, added = text.split("\n[Service]\nType=oneshot\n")
    dropped = [line for line in UNIT.splitlines() if line[:1] not in ("", "#") and line not in kept.splitlines()]
    assert [line.split("=")[0] for line in dropped] == [
        "Type",
        "ExecStartPre",
        "ExecStart",
        "Restart",
        "[Install]",
        "WantedBy",
    ]
    names = {line.split("=")[0] for line in added.splitlines()}
    assert names == {"Restart", "TimeoutStartSec", "ExecStart", "StandardOutput", "RuntimeDirectoryPreserve"}


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (PermissionError(errno.EPERM, "not permitted"), "denied"),
        (OSError(errno.EROFS, "read-only"), "denied"),
        (FileNotFoundError(errno.ENOENT, "hidden"), "denied"),
        (TimeoutError("timed out"), "denied"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "unclear"),
        (OSError(errno.EINVAL, "invalid"), "unclear"),
        (AttributeError("a mistake of the probe"), "unclear"),
    ],
)
def test_only_a_refusal_counts_as_denied(error: Exception, result: str) -> None:
    assert probes.tried(raising(error), {})["result"] == result


def test_what_a_probe_could_do_is_open() -> None:
    assert probes.tried(lambda _: "everything", {})["result"] == "open"
