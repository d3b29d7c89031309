"""The distribution's tools on a node, and what each boot loads."""

NODE = "molecule-chat-0"


def test_the_tools_are_the_distributions_own(host):
    assert host.package("infiniband-diags").is_installed
    assert host.check_output("command -v ib_write_bw") == "/usr/bin/ib_write_bw"


def test_no_subnet_manager_is_where_none_was_asked_for(host):
    assert not host.package("opensm").is_installed


def test_each_boot_loads_what_programs_need_and_no_peer_memory_that_the_kernel_has_not(host):
    modules = host.file("/etc/modules-load.d/gpuyard-infiniband.conf").content_string.split()
    assert modules[3:] == ["ib_uverbs", "ib_umad", "rdma_ucm"]


def test_sessions_may_lock_as_much_memory_as_an_adapter_reads(host):
    # Whether they then do is a matter of the host here.
    assert "root - memlock unlimited" in host.file("/etc/security/limits.d/gpuyard-infiniband.conf").content_string
