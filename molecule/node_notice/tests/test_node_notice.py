"""A node that hears when it is taken away: what runs there, what it may do, and what it has left behind."""

NODE = "molecule-chat-0"
UNIT = "gpuyard-notice.service"


def shown(host, name):
    return host.check_output(f"systemctl show --property={name} --value {UNIT}")


def test_the_service_runs_also_after_a_boot(host):
    assert host.service(UNIT).is_running
    assert host.service(UNIT).is_enabled
    assert shown(host, "NRestarts") == "0"


def test_it_may_do_nothing_but_listen_below_1024(host):
    assert shown(host, "CapabilityBoundingSet") == "cap_net_bind_service"
    assert set(shown(host, "IPAddressDeny").split()) == {"::/0", "0.0.0.0/0"}
    assert "169.254.169.254" not in shown(host, "IPAddressAllow"), "the stand-in is asked, and nobody else"


def test_a_notice_that_came_and_went_leaves_no_note_and_stands_in_the_journal(host):
    assert not host.file("/var/lib/gpuyard/notice.json").exists
    said = host.check_output(f"journalctl --unit={UNIT} --output=cat")
    assert "closed at the gateways for NOTICE-SPOT: AWS will terminate this spot instance at " in said


def test_a_look_finds_nothing_announced(host):
    look = host.run("/usr/local/lib/gpuyard/node_notice.py look")
    assert (look.rc, look.stdout) == (0, "")
