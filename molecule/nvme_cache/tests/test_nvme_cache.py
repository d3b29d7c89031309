"""A container sees its host's disks and has none of its own: none is taken, and the node is as it was."""

NODE = "molecule-chat-0"
LOOK = "python3 /usr/local/lib/gpuyard/nvme_cache.py look --model '*'"


def test_no_disk_of_the_host_is_taken_for_the_nodes_own(host):
    assert '"action": "none"' in host.check_output(LOOK)


def test_nothing_waits_for_a_file_system_that_will_not_come(host):
    assert not host.file("/etc/systemd/system/gpuyard-nvme-cache.service").exists
    assert "nvme-cache" not in host.run("systemctl cat 'vllm@any.service'").stdout
