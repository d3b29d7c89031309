"""The table of faults, without a lab: every row whole, every choice checked, the same choice the same fault."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gpuyard.cli import app
from gpuyard.cli import faults as commands
from gpuyard.lab.errors import LabError
from gpuyard.lab.faults import host_side, record, words
from gpuyard.lab.faults.model import CONTROLLER, Cut, Fault, Injection, OnNode, Repository, UsageError
from gpuyard.lab.faults.record import BREAKING, BROKEN, MENDING, WAITING, Entry
from gpuyard.lab.faults.slow_link import breaks_after, waiting_time
from gpuyard.lab.faults.table import FAULTS, fault_named, values_in
from gpuyard.lab.models import NodeSpec
from gpuyard.lab.place import Place
from tools.bench_upgrade_faults import ROWS as ROWS_OF_BENCH
from tools.bench_upgrade_faults import Row

PROJECT = Path(__file__).parents[2]
NODE = NodeSpec(name="lab-chat-0", role="gpu", pool="chat", gpu="H100-SXM5-80GB", gpu_count=8)
# Rows of the list in docs/lab.md; what its missing numbers mean, no lab can break.
ROWS = {f"F{n:02}" for n in range(1, 39) if n not in (28, 31)} | {"F46"}
EVERY = pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))


def injected(fault: Fault, seed: int = 0, values: Mapping[str, str] | None = None) -> Injection:
    return fault.chosen(None if fault.target == CONTROLLER else NODE, None, seed, values or {})


def scripts(injection: Injection) -> list[str]:
    steps = [step for step in FAULTS[injection.fault].steps(injection) if isinstance(step, OnNode)]
    probe = FAULTS[injection.fault].probe(injection)
    return [
        words.breaking(injection.fault, steps),
        words.mending(injection.fault, steps),
        words.asking(injection, probe.ask),
    ]


def test_every_row_of_the_list_has_a_fault_and_the_list_names_it() -> None:
    told = re.findall(r"^\| (F\d\d) \| .+ \| (.+) \|$", (PROJECT / "docs/lab.md").read_text(), re.MULTILINE)
    listed = {row: set(re.findall(r"`([^`]+)`", faults)) for row, faults in told}
    assert listed == {row: {fault.id for fault in FAULTS.values() if row in fault.rows} for row in ROWS}
    assert all(listed.values())


@EVERY
def test_a_fault_says_what_it_imitates_and_where_that_was_seen(fault: Fault) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fault.id)
    assert fault.imitates and fault.source and fault.rows
    assert fault.steps(injected(fault))
    for parameter in fault.parameters:
        assert parameter.checked(parameter.default) == parameter.default


@EVERY
def test_the_same_choice_is_the_same_fault(fault: Fault) -> None:
    for seed in (0, 1, 7):
        assert fault.steps(injected(fault, seed)) == fault.steps(injected(fault, seed))


@EVERY
def test_shell_text_is_shell_for_every_choice(fault: Fault) -> None:
    hostile = 'it\'s $(reboot) `x` "y" ; z'
    choices = [injected(fault)]
    for parameter in fault.parameters:
        for value in parameter.among or (() if parameter.between or parameter.like else (hostile,)):
            choices.append(injected(fault, 0, {parameter.name: value}))
    for injection in choices:
        for script in scripts(injection):
            done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{injection.values}: {done.stderr}"


@EVERY
def test_python_on_the_node_is_python_that_the_node_has(fault: Fault) -> None:
    for script in scripts(injected(fault)):
        for text in re.findall(r"<<'(?:PYTHON|PROGRAM)'\n(.*?)\n(?:PYTHON|PROGRAM)\n", script, re.DOTALL):
            compile(text, fault.id, "exec")


def test_whoever_breaks_on_a_node_mends_there() -> None:
    """But for lines of a log, which stay logged."""
    for fault in FAULTS.values():
        steps = [step for step in fault.steps(injected(fault)) if isinstance(step, OnNode)]
        told = [step for step in steps if "/run/gpuyard-lab/kmsg" in step.do]
        assert steps == told or any(step.undo for step in steps), fault.id


# --- choices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "node", "gpu", "given", "said"),
    [
        ("xid", NODE, 8, {}, "it has 0 to 7"),
        ("xid", NodeSpec(name="lab-gateway-0", role="gateway"), None, {}, "name a GPU node"),
        ("xid", NODE, 0, {"cod": "79"}, "did you mean code?"),
        ("xid", NODE, 0, {"code": "0"}, "a whole number from 1 to 9999"),
        ("xid", NODE, 0, {"code": "7.5"}, "a whole number"),
        ("xid", NODE, 0, {"words": "two\nlines"}, "one printable line"),
        ("engine-wrong-tokens", NODE, None, {"rate": "2"}, "a number from 0.0 to 1.0"),
        ("partition", NODE, None, {"direction": "up"}, "both, in, out"),
        ("partition", NODE, 1, {}, "leave --gpu out"),
        ("partition", None, None, {}, "it breaks a node"),
        ("program-killed", NODE, None, {}, "it breaks controller"),
        ("power-cut", NODE, None, {"now": "1"}, "it has none"),
        ("postinst-fails", NODE, None, {"package": "a;reboot"}, "like nvidia-persistenced"),
    ],
)
def test_a_choice_that_cannot_be_is_told_with_what_can(
    name: str, node: NodeSpec | None, gpu: int | None, given: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        fault_named(name).chosen(node, gpu, 0, given)
    assert said in str(caught.value)


@pytest.mark.parametrize("row", ROWS_OF_BENCH, ids=lambda row: row.name)
def test_the_bench_of_upgrades_breaks_a_node_as_its_faults_can(row: Row) -> None:
    assert injected(FAULTS[row.fault], values=values_in(row.parameters)).fault == row.fault


def test_an_unknown_fault_has_a_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean partition"):
        fault_named("partitoin")
    with pytest.raises(UsageError, match="gpuyard lab faults"):
        fault_named("zzzzzz")


@pytest.mark.parametrize("given", [["code"], ["=1"], ["a=1", "a=2"]])
def test_parameters_are_name_and_value_once(given: list[str]) -> None:
    with pytest.raises(UsageError):
        values_in(given)


# --- what follows from the records -------------------------------------------------------------------------


def entry(fault: str, stage: str = BROKEN, **values: str) -> Entry:
    return Entry(injected(FAULTS[fault], 0, values), stage)


def test_only_what_is_broken_is_wanted_of_this_machine() -> None:
    for stage, there in {BREAKING: True, BROKEN: True, MENDING: False, WAITING: False}.items():
        found = host_side.wanted(
            [entry("partition", stage), entry("rate-limit", stage), entry("version-missing", stage)]
        )
        assert bool(found.cuts) == bool(found.rate) == bool(found.repository) == there, stage


def test_the_bridge_drops_what_was_cut_and_nothing_else() -> None:
    ports = {"a": "vb-a", "b": "vb-b"}

    def rules(cut: Cut) -> list[str]:
        text = host_side.bridge_table("t", {"a": [cut]}, ports)
        return [line.strip() for line in text.splitlines() if line.endswith(" drop")]

    assert rules(Cut("in", "all")) == ['oifname "vb-a" drop', 'oifname "vb-a" drop']
    assert rules(Cut("out", "b")) == ['iifname "vb-a" oifname "vb-b" drop']
    assert rules(Cut("both", "host")) == ['iifname "vb-a" drop', 'oifname "vb-a" drop']
    assert len(rules(Cut("both", "all"))) == 4


def test_a_record_comes_back_as_it_was_written(place: Place) -> None:
    written = {"xid": entry("xid", code="999"), "apt-lock": Entry(injected(FAULTS["apt-lock"], 3), WAITING, due=12.5)}
    record.write(place, "lab-chat-0", written)
    assert record.read(place, "lab-chat-0") == written
    assert record.read_all(place) == {"lab-chat-0": written}
    record.write(place, "lab-chat-0", {})
    assert list(record.folder(place).iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"999"', '"998"'),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(f'"version": {record.VERSION}', '"version": 0'),
        lambda _: "[]",
    ],
    ids=["changed", "truncated", "older", "another"],
)
def test_a_record_written_by_somebody_else_is_refused_with_the_way_out(place: Place, change: object) -> None:
    record.write(place, "lab-chat-0", {"xid": entry("xid", code="999")})
    path = record.folder(place) / "lab-chat-0.json"
    assert callable(change)
    path.write_text(change(path.read_text()))
    with pytest.raises(LabError) as caught:
        record.read(place, "lab-chat-0")
    assert caught.value.rule == "FAULT-STATE"
    assert "mend lab-chat-0 --all" in str(caught.value)


def test_a_view_of_the_repository_names_what_changes() -> None:
    (step,) = FAULTS["version-missing"].steps(injected(FAULTS["version-missing"], 0, {"version": "580.126.20-1"}))
    assert step == Repository(without="nvidia-fabricmanager_580.126.20-1_*.deb")


# --- a slow link -------------------------------------------------------------------------------------------


def test_what_is_lost_comes_after_the_timeouts_of_tcp() -> None:
    assert waiting_time("1/0", 0, 0.1) == 0.1
    late = [waiting_time(f"1/{n}", 0.3, 0) for n in range(2000)]
    assert set(late[:50]) <= {0, 0.2, 0.2 + 0.4, 0.2 + 0.4 + 0.8, 0.2 + 0.4 + 0.8 + 1.6}
    assert 0.25 < sum(one > 0 for one in late) / len(late) < 0.35
    assert late == [waiting_time(f"1/{n}", 0.3, 0) for n in range(2000)]
    assert late != [waiting_time(f"2/{n}", 0.3, 0) for n in range(2000)]


def test_a_share_of_connections_breaks() -> None:
    ends = [breaks_after(f"1/{n}", 0.25) for n in range(2000)]
    assert 0.2 < sum(end is not None for end in ends) / len(ends) < 0.3
    assert breaks_after("1/0", 0) is None


# --- commands ----------------------------------------------------------------------------------------------


def lab(*given: str) -> Result:
    return CliRunner().invoke(app, ["lab", *given])


def test_the_list_is_a_table_and_the_same_in_json() -> None:
    rows = json.loads(lab("faults", "--json").stdout)
    assert [row["id"] for row in rows] == list(FAULTS)
    assert all(row["imitates"] and row["source"] and row["rows"] for row in rows)
    assert all(name in lab("faults").stdout for name in ("power-cut", "partition"))


def test_words_that_name_nothing_are_wrong_usage_and_the_rest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Pulumi.yaml").write_text("name: gpuyard\n")
    monkeypatch.chdir(tmp_path)

    def answering(error: LabError) -> None:
        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr(commands.agent, "fault_break", fails)

    answering(UsageError("no fault xidd", "did you mean xid?"))
    assert lab("break", "lab-chat-0", "xidd").exit_code == 2
    answering(LabError("FAULT-TWICE", "xid is broken on lab-chat-0", "a fault is broken once", "mend it"))
    done = lab("break", "lab-chat-0", "xid")
    assert done.exit_code == 3
    assert "FAULT-TWICE: xid is broken" in done.stderr
    assert lab("mend", "lab-chat-0").exit_code == 2
    assert lab("mend", "lab-chat-0", "xid", "--all").exit_code == 2


def test_programs_of_this_project_are_killed_and_no_others(place: Place, tmp_path: Path) -> None:
    project = place.lab.project
    project.mkdir()
    (tmp_path / "pulumi").symlink_to("/bin/sleep")
    words_ = [str(tmp_path / "pulumi"), "60"]
    with (
        subprocess.Popen(words_, cwd=project) as ours,
        subprocess.Popen(words_, cwd=tmp_path) as others,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=project) as another,
    ):
        try:
            step = FAULTS["program-killed"].steps(injected(FAULTS["program-killed"], 0, {"program": "pulumi"}))[0]
            assert isinstance(step, host_side.Killed)
            assert host_side.kill_programs(place, step) == [ours.pid]
            assert ours.wait(10) == -9
            assert others.poll() is None
            assert another.poll() is None
        finally:
            for process in (ours, others, another):
                process.kill()
    host_side.forget_killed(place, step)
    assert list(record.folder(place).iterdir()) == []


def test_a_truncated_state_is_restored_unless_somebody_mended_it(place: Place) -> None:
    step = FAULTS["pulumi-state-truncated"].steps(injected(FAULTS["pulumi-state-truncated"]))[0]
    assert isinstance(step, host_side.Truncated)
    path = place.lab.project / step.file.format(stack="lab")
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 3, "checkpoint": {}}')
    for mended in ("", '{"version": 4}'):
        host_side.truncate(place, step)
        assert len(path.read_text()) < 32
        host_side.truncate(place, step)  # again, by one that was killed
        if mended:
            path.write_text(mended)
        host_side.restore(place, step)
        assert path.read_text() == (mended or '{"version": 3, "checkpoint": {}}')
