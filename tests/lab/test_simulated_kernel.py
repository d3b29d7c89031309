"""The simulated kernel side of a GPU node, over a folder that plays the node."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "roles/lab_gpu/files/simulated_gpu.py"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FILE.parent)
    spec = importlib.util.spec_from_file_location("simulated_gpu", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    # A device file needs root; that it is there is what the code under test decides.
    monkeypatch.setattr(module, "make_device", lambda name: (tmp_path / "dev" / name).touch())
    (tmp_path / "dev").mkdir()
    plug(tmp_path, gpus=2)
    return module


def plug(root: Path, gpus: int, switches: int = 0, **more: object) -> None:
    state = root / "var/lib/gpuyard-lab"
    state.mkdir(parents=True, exist_ok=True)
    boards = [
        {
            "bdf": f"0000:{n + 16:02x}:00.0",
            "class": "0x030200",
            "device": "0x2330",
            "name": "H100",
            "uuid": f"GPU-{n}",
            **more,
        }
        for n in range(gpus)
    ]
    bridges = [{"bdf": f"0000:0{n}:00.0", "class": "0x068000", "device": "0x22a3"} for n in range(switches)]
    (state / "gpus.json").write_text(json.dumps({"gpus": boards, "switches": bridges}))


def install(root: Path, version: str, flavour: str = "open") -> None:
    path = root / "lib/modules/gpuyard-lab/nvidia.ko"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version, "flavour": flavour}))


def loaded_line(root: Path) -> str:
    return (root / "proc/driver/nvidia/version").read_text().splitlines()[0]


def test_without_an_installed_module_it_is_not_found(kernel: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.main("modprobe", ["nvidia"]) == 1
    assert "modprobe: FATAL: Module nvidia not found in directory /lib/modules/" in capsys.readouterr().err


def test_without_a_gpu_there_is_no_such_device(
    kernel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plug(tmp_path, gpus=0)
    install(tmp_path, "580.126.20")
    assert kernel.main("modprobe", ["nvidia"]) == 1
    assert "could not insert 'nvidia': No such device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flavour", "words"), [("open", "Open Kernel Module for x86_64"), ("proprietary", "x86_64 Kernel Module")]
)
def test_a_loaded_module_shows_version_and_flavour_as_the_real_one_does(
    kernel: ModuleType, tmp_path: Path, flavour: str, words: str
) -> None:
    install(tmp_path, "580.126.20", flavour)
    assert kernel.main("modprobe", ["nvidia"]) == 0
    assert loaded_line(tmp_path).startswith(f"NVRM version: NVIDIA UNIX {words}  580.126.20  Release Build")


def test_a_new_package_on_the_disk_does_not_change_what_is_loaded(
    kernel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "580.105.08")
    kernel.main("modprobe", ["nvidia"])
    install(tmp_path, "580.126.20")
    kernel.main("modprobe", ["nvidia"])
    assert "580.105.08" in loaded_line(tmp_path)
    kernel.main("modinfo", ["-F", "version", "nvidia"])
    assert capsys.readouterr().out == "580.126.20\n"
    assert kernel.main("modprobe", ["nvidia-uvm"]) == 1, "a module of another version than the loaded one"


def test_a_module_that_another_needs_is_not_unloaded(
    kernel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "580.126.20")
    kernel.main("modprobe", ["-a", "nvidia-drm", "nvidia-uvm"])
    assert kernel.main("rmmod", ["nvidia"]) == 1
    assert capsys.readouterr().err == "rmmod: ERROR: Module nvidia is in use by: nvidia_modeset nvidia_uvm\n"
    assert kernel.main("rmmod", ["nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia"]) == 0
    assert not (tmp_path / "proc/driver/nvidia").exists()
    assert not list((tmp_path / "dev").iterdir())


def test_a_module_whose_device_a_process_holds_is_not_unloaded(
    kernel: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "580.126.20")
    kernel.main("modprobe", ["nvidia"])
    with (tmp_path / "dev/nvidia0").open():
        assert kernel.main("modprobe", ["-r", "nvidia"]) == 1
        assert capsys.readouterr().err == "modprobe: FATAL: Module nvidia is in use.\n"
        kernel.main("lsmod", [])
        assert "nvidia              14381056  1" in capsys.readouterr().out
    assert kernel.main("modprobe", ["-r", "nvidia"]) == 0


def test_modprobe_takes_out_what_only_the_module_needed(kernel: ModuleType, tmp_path: Path) -> None:
    install(tmp_path, "580.126.20")
    kernel.main("modprobe", ["nvidia-drm"])
    assert kernel.main("modprobe", ["-r", "nvidia-drm"]) == 0
    assert kernel.loaded() == {}


def test_unloading_what_is_not_loaded_is_fine_for_modprobe_and_an_error_for_rmmod(
    kernel: ModuleType, tmp_path: Path
) -> None:
    install(tmp_path, "580.126.20")
    assert kernel.main("modprobe", ["-r", "nvidia"]) == 0
    assert kernel.main("rmmod", ["nvidia"]) == 1


def test_the_bus_shows_exactly_what_is_plugged_in(kernel: ModuleType, tmp_path: Path) -> None:
    plug(tmp_path, gpus=8, switches=4)
    kernel.plug_in()
    bus = tmp_path / "var/lib/gpuyard-lab/pci"
    classes = [(slot / "class").read_text().strip() for slot in bus.iterdir()]
    assert (classes.count("0x030200"), classes.count("0x068000")) == (8, 4)
    plug(tmp_path, gpus=1)
    kernel.plug_in()
    assert [slot.name for slot in bus.iterdir()] == ["0000:10:00.0"]


def test_another_module_is_left_to_the_real_tool(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def execv(_: str, words: list[str]) -> None:
        seen.append(words)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit):
        kernel.main("modprobe", ["-q", "overlay"])
    assert seen == [["modprobe", "-q", "overlay"]]
