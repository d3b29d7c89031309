"""What a stand-in for AWS's installer left, and that nothing of what was fetched stays."""

NODE = "molecule-chat-0"


def test_the_installer_that_was_run_is_the_locked_one(host):
    assert "EFA installer version: 1.50.0" in host.file("/opt/amazon/efa_installed_packages").content_string


def test_what_was_unpacked_is_cleared_away(host):
    assert "1.50.0" not in host.check_output("ls -A /var/lib/gpuyard/efa")


def test_sessions_may_lock_as_much_memory_as_a_card_reads(host):
    # Whether they then do is a matter of the host here.
    assert "root - memlock unlimited" in host.file("/etc/security/limits.d/gpuyard-efa.conf").content_string
