"""The firewall of a lab, as text."""

import re
import shutil
import subprocess

import pytest

from gpuyard.lab.network import nft_table

TABLE = nft_table("gpuyard_abc123", "gy-abc123", "10.77.4.0/24", "10.77.4.10", 8080)


def test_a_new_table_replaces_the_old_one_in_one_transaction() -> None:
    assert TABLE.startswith("table ip gpuyard_abc123\ndelete table ip gpuyard_abc123\ntable ip gpuyard_abc123 {")


def test_the_port_of_this_machine_leads_to_the_gateway_and_no_other_address_does() -> None:
    assert "ip daddr 127.0.0.1 tcp dport 8080 dnat to 10.77.4.10:8080" in TABLE
    assert len(re.findall("dnat to", TABLE)) == 1


def test_nodes_go_out_under_this_machines_address_and_never_in_to_its_loopback() -> None:
    assert 'ip saddr 10.77.4.0/24 oifname != "gy-abc123" masquerade' in TABLE
    assert 'iifname "gy-abc123" ip daddr 127.0.0.0/8 drop' in TABLE


@pytest.mark.lab
def test_nft_takes_the_table() -> None:
    assert shutil.which("nft")
    done = subprocess.run(["nft", "-c", "-f", "-"], input=TABLE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
