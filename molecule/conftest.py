"""How the rehearsal's tests reach a node: by SSH with the lab's key and its checked host key.

Not through testinfra's Ansible backend: it does not know the values of an inventory that are marked as no templates.
"""

import os
from pathlib import Path

import pytest
import testinfra

from gpuyard.lab import agent

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY", Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="module")
def host(request):
    """The node that the test module names as NODE."""
    lab = agent.LabRef(project=PROJECT, stack="molecule")
    node, network = agent.node_read(lab, request.module.NODE), agent.network_read(lab)
    assert node and network, f"{request.module.NODE} is not there"
    return testinfra.get_host(
        f"ssh://root@{node.address}",
        ssh_identity_file=str(network.ssh.private_key_file),
        ssh_extra_args=f"-o UserKnownHostsFile={network.ssh.known_hosts_file} -o StrictHostKeyChecking=yes",
    )
