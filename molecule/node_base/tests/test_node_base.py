"""What every node of a fleet has, whatever runs on it."""

import pytest

NODE = "molecule-gateway-0"


def test_the_nodes_know_each_other_by_name(host):
    for name in ("molecule-chat-0", "molecule-gateway-0"):
        assert host.check_output(f"getent ahostsv4 {name}")


def test_the_node_tells_its_fleet(host):
    assert host.check_output("cat /etc/ansible/facts.d/gpuyard.fact") == '{"fleet": "molecule"}'


def test_the_journal_is_on_the_disk_and_bounded(host):
    identity = host.check_output("cat /etc/machine-id")
    assert host.file(f"/var/log/journal/{identity}/system.journal").is_file
    assert "SystemMaxUse=1G" in host.check_output("systemd-analyze cat-config systemd/journald.conf")


@pytest.mark.parametrize("setting", ["APT::Periodic::Unattended-Upgrade", "APT::Periodic::Update-Package-Lists"])
def test_no_package_changes_by_itself(host, setting):
    assert host.check_output(f"apt-config shell value {setting}") == "value='0'"
    assert host.run("systemctl is-enabled apt-daily-upgrade.timer").stdout.strip() != "enabled"
