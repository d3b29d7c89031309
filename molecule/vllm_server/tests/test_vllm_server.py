"""What the engine role promises of a node, read from the node itself."""

import json
import time

import pytest

NODE = "molecule-chat-0"
MODEL = "smollm2-135m-instruct"
UNIT = f"vllm@{MODEL}.service"
SHARD = "model-00002-of-00003.safetensors"


def show(host, *properties):
    """Properties of the unit as systemd holds them."""
    out = host.check_output(f"systemctl show {UNIT} " + " ".join(f"-p {p}" for p in properties))
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def main_pid(host):
    return int(show(host, "MainPID")["MainPID"])


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(2)
    pytest.fail(f"waited {seconds} s for {what}")


def test_the_unit_runs_under_its_own_user_and_starts_at_boot(host):
    state = show(host, "ActiveState", "User", "UnitFileState")
    assert state["ActiveState"] == "active"
    assert state["User"] == "vllm"
    assert state["UnitFileState"] == "enabled"
    assert host.user("vllm").shell.endswith("nologin")


def test_systemd_waits_longer_for_a_stop_than_the_engine_needs_to_drain(host):
    command = host.check_output(f"tr '\\0' ' ' </proc/{main_pid(host)}/cmdline")
    drain = int(command.split("--shutdown-timeout", 1)[1].split()[0].lstrip("="))
    stop = host.check_output(f"systemctl show {UNIT} -p TimeoutStopUSec --value")
    assert drain > 0
    assert stop == "1min 15s", f"drain {drain} s, stop {stop}"


def test_the_engine_key_is_in_no_command_line_and_no_readable_file(host):
    key = host.check_output(f"cat /etc/vllm/credentials/{MODEL}.key")
    assert len(key) >= 32
    assert key not in host.check_output("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
    assert host.file(f"/etc/vllm/credentials/{MODEL}.key").mode == 0o600
    assert key not in host.check_output("journalctl --no-pager -o cat")
    assert host.run(f"runuser -u nobody -- cat /etc/vllm/credentials/{MODEL}.key").failed


def test_the_sandbox_scores_what_was_decided(host):
    report = host.check_output(f"systemd-analyze security --no-pager --json=short {UNIT}")
    exposure = sum(float(row["exposure"] or 0) for row in json.loads(report) if row.get("exposure"))
    overall = host.check_output(f"systemd-analyze security --no-pager {UNIT}").rsplit("exposure level", 1)[1]
    score = float(overall.split(":")[1].split()[0])
    assert score <= 1.5, f"exposure {score}, sum of rows {exposure}"


def test_a_broken_model_is_refused_by_name_and_the_mended_one_serves_again(host):
    """Flipped byte, missing shard, pickle and remote code: each refused, each named, none served."""
    path = host.check_output(f"ls -d /var/lib/models/{MODEL}/*/").strip().rstrip("/")
    config = f"{path}/config.json"
    shard = f"{path}/{SHARD}"
    host.check_output(f"systemctl stop {UNIT}")
    broken = {
        "flipped byte": (
            f"printf '\\377' | dd of={shard} bs=1 seek=4096 count=1 conv=notrunc status=none",
            SHARD,
        ),
        "missing shard": (f"mv {shard} /var/lib/kept", SHARD),
        "pickle": (f"touch {path}/pytorch_model.bin", "pytorch_model.bin"),
        "remote code": (f'sed -i \'0,/{{/s//{{"auto_map": {{"AutoModel": "x.Y"}},/\' {config}', "config.json"),
    }
    host.check_output(f"cp -a {path} /var/lib/whole")
    try:
        for name, (breaking, named) in broken.items():
            host.check_output(breaking)
            host.run(f"systemctl reset-failed {UNIT}")
            since = host.check_output("date '+%Y-%m-%d %H:%M:%S'")
            assert host.run(f"systemctl start {UNIT}").failed, f"{name}: the unit started"
            journal = host.check_output(f"journalctl --no-pager -o cat -u {UNIT} --since '{since}'")
            assert named in journal, f"{name}: the journal does not name {named}: {journal}"
            assert "MODEL-" in journal, f"{name}: no rule id in {journal}"
            host.check_output(f"systemctl stop {UNIT}; rm -rf {path} && cp -a /var/lib/whole {path}")
    finally:
        host.check_output(f"rm -rf {path} /var/lib/kept && mv /var/lib/whole {path} && systemctl reset-failed {UNIT}")
    host.check_output(f"systemctl start {UNIT}")
    assert show(host, "ActiveState")["ActiveState"] == "active"


def test_a_killed_engine_is_back_by_systemd_alone_and_leaves_nothing_behind(host):
    before = main_pid(host)
    host.check_output(f"kill -9 {before}")
    wait_until(
        lambda: main_pid(host) not in (0, before) and show(host, "ActiveState")["ActiveState"] == "active",
        300,
        "systemd to bring the engine back",
    )
    pids = host.check_output(f"cat /sys/fs/cgroup/$(systemctl show {UNIT} -p ControlGroup --value)/cgroup.procs")
    engines = host.check_output("pgrep -u vllm").split()
    assert set(engines) <= set(pids.split()), "a process of the old engine is still there"
