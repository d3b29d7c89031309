"""The locked driver is installed, held, loaded and answers, and it is one."""

NODE = "molecule-chat-0"
LOCKED = "580.126.20"
PACKAGES = ["libnvidia-ml1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced"]


def test_installed_and_held_is_what_is_locked(host):
    held = host.check_output("apt-mark showhold").split()
    for package in PACKAGES:
        assert host.package(package).version == f"{LOCKED}-1"
        assert package in held


def test_what_is_loaded_is_what_is_installed(host):
    loaded = host.check_output("cat /proc/driver/nvidia/version")
    assert f" {LOCKED} " in loaded
    assert "Open Kernel Module" in loaded
    assert host.check_output("modinfo --field=version nvidia") == LOCKED


def test_every_gpu_answers(host):
    answers = host.check_output("nvidia-smi --query-gpu=driver_version --format=csv,noheader").split()
    assert answers == [LOCKED, LOCKED]


def test_the_persistence_daemon_runs_and_no_fabric_manager_without_a_switch(host):
    daemon = host.service("nvidia-persistenced.service")
    assert daemon.is_enabled
    assert daemon.is_running
    assert not host.package("nvidia-fabricmanager").is_installed
