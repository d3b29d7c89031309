"""The faults of a node's GPUs laid over its hardware: what `apply` writes for NVML, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .test_simulated_kernel import install, kernel, plug

__all__ = ["kernel"]


def broken(root: Path, patch: Any, fault: str = "f") -> Path:
    file = root / f"var/lib/gpuyard-lab/faults.d/{fault}.json"
    file.parent.mkdir(exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(patch if isinstance(patch, str) else json.dumps({"patch": patch}))
    return fresh.rename(file)


def written(root: Path) -> dict[str, str]:
    text = (root / "run/gpuyard-lab/gpus.state").read_text().splitlines()
    assert (text[0], text[-1]) == ("gpuyard-gpus 1", "end")
    assert text[1:-1] == sorted(text[1:-1], key=lambda line: line.split("=")[0].encode())
    return dict(line.split("=", 1) for line in text[1:-1])


def test_a_healthy_node_has_every_key_at_its_value(kernel: ModuleType, tmp_path: Path) -> None:
    assert kernel.main("simulated_gpu.py", ["apply"]) == 0
    state = written(tmp_path)
    assert (state["gpus"], state["gpu.1.uuid"], state["gpu.1.minor"]) == ("2", "GPU-1", "1")
    assert state["gpu.0.ecc.uncorrected.volatile.dram"] == "0"
    assert "gpu.0.temperature_c" not in state, "it moves with the load"


def test_patches_are_laid_over_each_other_in_the_order_of_their_names(kernel: ModuleType, tmp_path: Path) -> None:
    broken(tmp_path, {"gpus": {"0": {"temperature_c": 95, "lost": True}}}, "a")
    broken(tmp_path, {"gpus": {"0": {"temperature_c": None, "ecc": {"corrected": {"volatile": {"dram": 7}}}}}}, "b")
    assert kernel.main("simulated_gpu.py", ["apply"]) == 0
    state = written(tmp_path)
    assert (state["gpu.0.lost"], state["gpu.0.ecc.corrected.volatile.dram"]) == ("1", "7")
    assert "gpu.0.temperature_c" not in state, "null takes it back to the hardware's own"


def test_mended_it_is_as_before_and_a_second_run_writes_nothing(kernel: ModuleType, tmp_path: Path) -> None:
    kernel.main("simulated_gpu.py", ["apply"])
    file = tmp_path / "run/gpuyard-lab/gpus.state"
    before, stamp = file.read_bytes(), file.stat().st_mtime_ns
    kernel.main("simulated_gpu.py", ["apply"])
    assert file.stat().st_mtime_ns == stamp
    fault = broken(tmp_path, {"gpus": {"1": {"recovery_action": 2}}})
    kernel.main("simulated_gpu.py", ["apply"])
    assert written(tmp_path)["gpu.1.recovery_action"] == "2"
    fault.unlink()
    kernel.main("simulated_gpu.py", ["apply"])
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"patch": 7}', "patch is 7"),
        ({"gpus": {"2": {"lost": True}}}, "patches GPU 2 of a node with 2 GPUs"),
        ({"gpus": {"0": {"temprature_c": 1}}}, "did you mean `temperature_c`?"),
        ({"gpus": {"0": {"ecc": {"corrected": 1}}}}, "patch.gpus.0.ecc.corrected is 1"),
        ({"gpus": {"0": {"temperature_c": True}}}, "make it int"),
        ({"gpus": {"0": {"temperature_c": -1}}}, "make it 0 or more"),
        ({"gpus": {"0": {"name": "a\nb"}}}, "make it one printable line"),
        ({"gpus": {"0": {"nvlink": [{"state": "inactive"}]}}}, "patches link 0 of a GPU with 0 links"),
        ({"driver": {"load_errors": "no"}}, "did you mean `load_error`?"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    kernel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], patch: Any, said: str
) -> None:
    kernel.main("simulated_gpu.py", ["apply"])
    before = written(tmp_path)
    broken(tmp_path, patch)
    assert kernel.main("simulated_gpu.py", ["apply"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("LAB-STATE: ")
    assert said in error
    assert written(tmp_path) == before


def test_links_are_patched_as_a_list_or_by_number(kernel: ModuleType, tmp_path: Path) -> None:
    plug(tmp_path, gpus=1, switches=4, nvlink_links=18)
    broken(tmp_path, {"gpus": {"0": {"nvlink": [{"state": "inactive"}, {"crc_errors": 3}]}}}, "a")
    broken(tmp_path, {"gpus": {"0": {"nvlink": {"17": {"replays": 9}}}}}, "b")
    kernel.main("simulated_gpu.py", ["apply"])
    state = written(tmp_path)
    links = [state[f"gpu.0.nvlink.{link}.state"] for link in range(18)]
    assert links == ["inactive"] + ["active"] * 17
    assert (state["gpu.0.nvlink.1.crc_errors"], state["gpu.0.nvlink.17.replays"]) == ("3", "9")


def test_a_gpu_that_is_gone_is_on_no_bus_and_the_others_move_up(kernel: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "580.126.20")
    kernel.main("modprobe", ["nvidia"])
    broken(tmp_path, {"gpus": {"0": {"present": False}}})
    kernel.main("simulated_gpu.py", ["apply"])
    state = written(tmp_path)
    assert (state["gpus"], state["gpu.0.uuid"]) == ("1", "GPU-1")
    assert [slot.name for slot in (tmp_path / "var/lib/gpuyard-lab/pci").iterdir()] == ["0000:11:00.0"]
    assert [slot.name for slot in (tmp_path / "proc/driver/nvidia/gpus").iterdir()] == ["0000:11:00.0"]
    assert sorted(path.name for path in (tmp_path / "dev").iterdir()) == ["nvidia0", "nvidiactl"]


def test_a_gpu_that_does_not_come_up_is_on_the_bus_and_not_counted(kernel: ModuleType, tmp_path: Path) -> None:
    broken(tmp_path, {"gpus": {"0": {"init_failed": True}}})
    kernel.main("simulated_gpu.py", ["apply"])
    state = written(tmp_path)
    assert (state["gpus"], state["gpu.0.uuid"], state["gpu.0.minor"]) == ("1", "GPU-1", "1")
    assert len(list((tmp_path / "var/lib/gpuyard-lab/pci").iterdir())) == 2


def test_the_kernel_may_refuse_a_module_and_know_foreign_ones(
    kernel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "580.126.20")
    broken(tmp_path, {"driver": {"load_error": "Key was rejected by service", "foreign_modules": {"nouveau": 2564096}}})
    assert kernel.main("modprobe", ["nvidia"]) == 1
    assert "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service" in capsys.readouterr().err
    kernel.main("lsmod", [])
    assert "nouveau              2564096  0\n" in capsys.readouterr().out
    broken(tmp_path, {"driver": {"modules_refused": {"nvidia_peermem": "Invalid argument"}}})
    assert kernel.main("modprobe", ["-a", "nvidia", "nvidia-peermem"]) == 1
    assert "could not insert 'nvidia_peermem': Invalid argument" in capsys.readouterr().err
    assert set(kernel.loaded()) == {"nvidia"}


def test_two_at_once_leave_one_whole_state(kernel: ModuleType, tmp_path: Path) -> None:
    def breaks(number: int) -> int:
        broken(tmp_path, {"gpus": {"0": {"retired_pages": {"single_bit": number}}}}, f"f{number}")
        return kernel.main("simulated_gpu.py", ["apply"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(breaks, range(8), timeout=30)) == [0] * 8
    assert written(tmp_path)["gpu.0.retired_pages.single_bit"] == "7"
