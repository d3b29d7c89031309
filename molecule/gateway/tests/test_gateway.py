"""The gateway as a node has it; what its users meet is asked in end_to_end."""

NODE = "molecule-gateway-0"


def test_it_runs_and_starts_at_boot(host):
    unit = host.service("haproxy.service")
    assert unit.is_enabled
    assert unit.is_running
    assert host.socket("tcp://0.0.0.0:8081").is_listening


def test_its_settings_are_readable_by_itself_alone(host):
    for name in ("haproxy.cfg", "secrets.cfg", "keys.sha256"):
        file = host.file(f"/etc/haproxy/{name}")
        assert (file.user, file.group, file.mode) == ("root", "haproxy", 0o640), name


def test_it_runs_on_what_is_written(host):
    for sums in ("started", "loaded"):
        host.check_output(f"sha256sum --check --status /run/haproxy/{sums}.sha256")


def test_it_knows_the_engines_of_the_fleet(host):
    servers = host.check_output("python3 /usr/local/lib/gpuyard/gateway_state.py servers")
    assert "molecule-chat-0" in servers
