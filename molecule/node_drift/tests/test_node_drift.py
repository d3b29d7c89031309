"""The node looks by itself, has found nothing, and lets itself be restarted."""

import json

NODE = "molecule-chat-0"
LOCKED = "580.126.20"
PROGRAM = "/usr/local/lib/gpuyard/node_drift.py"


def test_the_node_looks_every_day_and_whenever_a_package_changes(host):
    for unit in ("gpuyard-drift.timer", "gpuyard-drift.path"):
        assert host.service(unit).is_enabled
        assert host.service(unit).is_running
    looked = "systemctl show --property=NextElapseUSecRealtime --value gpuyard-drift.timer"
    assert host.check_output(looked) not in ("", "n/a")
    assert host.check_output("systemctl show --property=Result --value gpuyard-drift.service") == "success"


def test_what_it_last_saw_is_kept_and_nothing_has_drifted(host):
    kept = json.loads(host.file("/var/lib/gpuyard/drift.json").content_string)
    assert kept["findings"] == []
    assert (kept["loaded"], kept["locked"], kept["next_module"]) == (LOCKED, LOCKED, LOCKED)


def test_a_lifted_hold_is_found_and_a_look_by_hand_changes_nothing(host):
    host.check_output("apt-mark unhold libnvidia-ml1")
    try:
        looked = host.run(f"{PROGRAM} look")
        assert looked.rc == 1
        assert looked.stdout.startswith("DRIFT-HOLD: the hold on libnvidia-ml1 was lifted: ")
    finally:
        host.check_output("apt-mark hold libnvidia-ml1")
    assert host.run(f"{PROGRAM} look").rc == 0


def test_a_node_that_keeps_its_driver_may_be_restarted(host):
    assert host.check_output("systemctl show --property=RefuseManualStart --value reboot.target") == "no"
    assert not host.file("/run/systemd/system/reboot.target.d/gpuyard-drift.conf").exists
