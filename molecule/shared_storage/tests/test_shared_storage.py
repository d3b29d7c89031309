"""A folder is where the fleet asks for it, and a server that is away holds up neither the boot nor the play."""

NODE = "molecule-chat-0"


def test_the_folder_is_seen_at_its_path_with_the_options_that_were_decided(host):
    assert host.file("/mnt/data/note").content_string == "shared\n"
    assert {"nosuid", "nodev", "noatime"} <= set(host.mount_point("/mnt/data").options)


def test_what_was_written_to_prove_it_is_gone(host):
    assert host.check_output("ls -A /srv/data") == "note"


def test_the_boot_does_not_wait_for_a_server_that_is_away(host):
    assert "mnt-away" not in host.check_output("systemctl show --property=After multi-user.target remote-fs.target")
    host.run("systemctl start --no-block mnt-away.mount")
    host.check_output("timeout 20 systemctl start multi-user.target")
    assert host.check_output("systemctl show --property=ActiveState --value mnt-away.mount") == "activating"
    host.check_output("systemctl stop mnt-away.mount")


def test_the_engines_wait_for_what_is_required_and_for_nothing_else(host):
    told = host.check_output("systemctl show --property=RequiresMountsFor --value reads-data.service")
    assert "/mnt/data" in told
    assert "/mnt/away" not in told


def test_each_option_has_its_reason_in_the_unit(host):
    unit = host.file("/etc/systemd/system/mnt-away.mount").content_string
    assert "# flock: locks hold between nodes" in unit
    assert "Options=flock," in unit
