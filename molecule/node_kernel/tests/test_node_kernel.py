"""On a node whose kernel is its host's: the units of the way back are there and hold still."""

from __future__ import annotations

import pytest

NODE = "molecule-chat-0"
SERVICE, TIMER = "gpuyard-kernel-trial.service", "gpuyard-kernel-trial.timer"
TRIAL = "/var/lib/gpuyard/kernel-trial"


def boot(host):
    return host.check_output(
        "cat /proc/sys/kernel/random/boot_id; systemctl show --property=UserspaceTimestamp --value"
    )


def test_systemd_finds_nothing_wrong_with_the_units(host):
    assert host.check_output(f"systemd-analyze verify /etc/systemd/system/{SERVICE} /etc/systemd/system/{TIMER}") == ""


def test_no_deadline_runs_while_no_kernel_is_on_trial(host):
    assert host.run(f"systemctl is-enabled {TIMER}").stdout.strip() == "disabled"
    assert host.run(f"systemctl is-active {TIMER}").stdout.strip() == "inactive"


@pytest.mark.parametrize("trial", [None, "6.1.0-1-other\nb1\n"])
def test_a_node_that_runs_no_kernel_on_trial_is_not_restarted(host, trial):
    before = boot(host)
    try:
        if trial:
            host.check_output(f"mkdir -p /var/lib/gpuyard && printf %s '{trial}' >{TRIAL}")
        host.check_output(f"systemctl start {SERVICE}")
        assert not host.file(f"{TRIAL}.unheard").exists
        assert boot(host) == before
    finally:
        host.check_output(f"rm -f {TRIAL}")
