"""The hardware that a lab node has, as what runs on it sees it."""

NODE = "molecule-chat-0"
BUS = "/var/lib/gpuyard-lab/pci"


def test_the_bus_shows_the_gpus_of_the_pool_and_no_switch(host):
    classes = host.check_output(f"cat {BUS}/*/class").split()
    assert classes == ["0x030200", "0x030200"]
    assert set(host.check_output(f"cat {BUS}/*/device").split()) == {"0x26b9"}  # L40S


def test_the_gpus_are_plugged_in_at_every_boot(host):
    unit = host.service("gpuyard-lab-gpu.service")
    assert unit.is_enabled
    assert unit.is_running


def test_the_modules_of_the_simulation_are_found_and_all_others_are_the_kernels(host):
    assert host.check_output("command -v modprobe") == "/usr/local/sbin/modprobe"
    assert host.run("modprobe --dry-run no_such_module").rc != 0
