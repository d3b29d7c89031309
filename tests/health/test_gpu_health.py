"""What nvidia-smi shows of GPUs, and the verdicts on it: the real nvidia-smi, asking the simulated NVML."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpuyard.health import (
    clocks_event_reasons,
    ecc_errors,
    gpu_recovery_action,
    gpu_temperature,
    nvlink,
    pcie_link,
    remapped_rows,
    smi,
    tools,
)
from gpuyard.health.thresholds import THRESHOLDS
from gpuyard.health.verdict import DEGRADED, HEALTHY, UNHEALTHY, Verdict
from gpuyard.health.xid_catalog import QUARANTINE, RECOVERY_ACTIONS
from tests.lab.simulated_node import Node, boards, on

FAMILY = (clocks_event_reasons, ecc_errors, gpu_recovery_action, gpu_temperature, pcie_link, remapped_rows)
FIRST = "0000:19:00.0"
SECOND = "0000:29:00.0"


def said(node: Node, *words: str) -> tools.Answer:
    done = node.smi(*words)
    return tools.Answer(done.returncode == 0, (done.stdout + done.stderr).strip())


def shown(node: Node) -> dict[str, Verdict]:
    """Every probe of the family, as a node's nvidia-smi answers it."""
    query = said(node, "-q", "-x")
    linked = nvlink.judge(query, said(node, "nvlink", "--status"), said(node, "nvlink", "--errorcounters"), 0)
    return {verdict.check: verdict for verdict in [linked, *(probe.judge(query) for probe in FAMILY)]}


def unwell(node: Node) -> dict[str, str]:
    return {check: verdict.reason for check, verdict in shown(node).items() if verdict.state == UNHEALTHY}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return on(tmp_path)


@functools.cache
def recorded(board: str = "H100-SXM5-80GB") -> tuple[str, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        node = on(Path(folder), board)
        texts = [said(node, *words).text for words in (("-q", "-x"), ("nvlink", "-s"), ("nvlink", "-e"))]
    return texts[0], texts[1], texts[2]


def edited(pattern: str, text: str, board: str = "H100-SXM5-80GB", times: int = 1) -> tools.Answer:
    """What nvidia-smi said, with something else in one place of the first GPU."""
    changed, count = re.subn(pattern, text, recorded(board)[0], count=times, flags=re.DOTALL)
    assert count, f"there is no {pattern}"
    return tools.Answer(True, changed)


def field(name: str, value: object, board: str = "H100-SXM5-80GB") -> tools.Answer:
    return edited(f"<{name}>[^<]*</{name}>", f"<{name}>{value}</{name}>", board)


def without(name: str, board: str = "H100-SXM5-80GB") -> tools.Answer:
    return edited(rf"<{name}>.*?</{name}>", "", board, times=0)


# --- on simulated hardware -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", list(boards()))
def test_gpus_that_are_well_are_healthy_on_every_board(tmp_path: Path, board: str) -> None:
    verdicts = shown(on(tmp_path, board))
    assert {check: verdict.reason for check, verdict in verdicts.items() if verdict.state != HEALTHY} == {}
    assert len(verdicts) == len(FAMILY) + 1
    for probe in FAMILY:
        assert len(verdicts[probe.CHECK].found) == 8
        assert {FIRST, SECOND} < set(verdicts[probe.CHECK].found)


UNCORRECTED = {"uncorrected": {"volatile": {"sram": 1}}}


@pytest.mark.parametrize(
    ("patch", "checks", "words"),
    [
        ({"ecc": UNCORRECTED}, {"check_ecc_errors"}, "1 sram uncorrectable ECC errors"),
        ({"ecc": {"uncorrected": {"volatile": {"dram": 3}}}}, {"check_ecc_errors"}, "3 dram uncorrectable ECC errors"),
        ({"ecc": {"sram_threshold_exceeded": True}}, {"check_ecc_errors"}, "threshold of uncorrectable errors"),
        ({"remapped_rows": {"pending": True}}, {"check_remapped_rows"}, "remapped at the next reset"),
        ({"remapped_rows": {"failure": True}}, {"check_remapped_rows"}, "return the GPU"),
        ({"pcie": {"width": 8}}, {"check_pcie_link"}, "8 of 16 lanes"),
        ({"pcie": {"gen": 3}}, {"check_pcie_link"}, "generation 3 instead of 5"),
        ({"clocks_event_reasons": 0x8}, {"check_clocks_event_reasons"}, "held down: hw_slowdown"),
        ({"clocks_event_reasons": 0x40}, {"check_clocks_event_reasons"}, "held down: hw_thermal_slowdown"),
        ({"clocks_event_reasons": 0x80}, {"check_clocks_event_reasons"}, "held down: hw_power_brake_slowdown"),
        ({"temperature_c": 94}, {"check_gpu_temperature"}, "94 °C"),
        ({"recovery_action": 1}, {"check_gpu_recovery_action"}, "asks for a reset"),
        ({"recovery_action": 4}, {"check_gpu_recovery_action"}, "drained and reset"),
        ({"nvlink": {"3": {"state": "inactive"}}}, {"check_nvlink"}, "NVLinks are inactive: 3"),
        ({"nvlink": {"4": {"crc_errors": 7}}}, {"check_nvlink"}, "NVLink 4 has counted 7 CRC Errors"),
        ({"nvml": {"nvmlDeviceGetRemappedRows": 999}}, {"check_remapped_rows"}, "neither Yes nor No"),
        ({"nvml": {"nvmlDeviceGetTemperature": 999}}, {"check_gpu_temperature"}, "is no number"),
        ({"lost": True}, {"check_nvlink", *(probe.CHECK for probe in FAMILY)}, "GPU is lost"),
    ],
    ids=str,
)
def test_a_fault_of_one_gpu_is_found_by_the_probe_for_it_alone(
    node: Node, patch: Mapping[str, Any], checks: set[str], words: str
) -> None:
    node.patch(gpus={"1": patch})
    found = unwell(node)
    assert set(found) == checks
    for reason in found.values():
        assert words in reason
        assert FIRST not in reason
        assert "lost" in patch or f"GPU {SECOND}: " in reason
    node.patch()
    assert unwell(node) == {}


@pytest.mark.parametrize("reasons", [0x0, 0x1, 0x2, 0x4, 0x10, 0x100], ids=hex)
def test_clocks_that_load_and_settings_choose_are_healthy(node: Node, reasons: int) -> None:
    node.patch(gpus={"1": {"clocks_event_reasons": reasons}})
    assert shown(node)["check_clocks_event_reasons"].state == HEALTHY


def test_software_that_slows_a_hot_gpu_down_degrades_it(node: Node) -> None:
    node.patch(gpus={"1": {"clocks_event_reasons": 0x20}})
    assert shown(node)["check_clocks_event_reasons"].state == DEGRADED


def test_a_link_that_saves_power_is_no_fault(tmp_path: Path) -> None:
    """The L4 idles in P8, where its link is slow."""
    node = on(tmp_path, "L4")
    node.patch(gpus={"1": {"pcie": {"gen": 1}}})
    assert unwell(node) == {}
    slow = re.sub("<performance_state>P8<", "<performance_state>P0<", said(node, "-q", "-x").text)
    assert "generation 1 instead of 4" in pcie_link.judge(tools.Answer(True, slow)).reason


# --- thresholds ------------------------------------------------------------------------------------------------------


def counted(name: str) -> Callable[[int], Verdict]:
    return lambda value: ecc_errors.judge(field(name, value))


def counter(name: str) -> Callable[[int], Verdict]:
    def verdict(value: int) -> Verdict:
        query, status, errors = recorded()
        if f": {name}: " not in errors:
            errors = re.sub(r"(?m)^(\s*Link (\d+): )Replay Errors: 0$", rf"\g<1>{name}: 0\n\g<0>", errors)
        changed = errors.replace(f"{name}: 0", f"{name}: {value}", 1)
        return nvlink.judge(*(tools.Answer(True, text) for text in (query, status, changed)), 0)

    return verdict


def inactive(count: int) -> Verdict:
    query, status, errors = recorded()
    changed = re.sub("26.562 GB/s", "<inactive>", status, count=count) if count else status
    return nvlink.judge(*(tools.Answer(True, text) for text in (query, changed, errors)), 0)


# At 87 °C none is left to the limit of an H100, and it slows down 2 °C above that.
BY_THRESHOLD: Mapping[str, tuple[Callable[[int], Verdict], ...]] = {
    "sram_uncorrectable": (counted("sram_uncorrectable_parity"), counted("sram_uncorrectable_secded")),
    "dram_uncorrectable": (counted("dram_uncorrectable"),),
    "sram_correctable": (counted("sram_correctable"),),
    "dram_correctable": (counted("dram_correctable"),),
    "pcie_lanes_missing": (lambda missing: pcie_link.judge(field("current_link_width", f"{16 - missing}x")),),
    "pcie_generations_missing": (lambda missing: pcie_link.judge(field("current_link_gen", 5 - missing)),),
    "degrees_above_slowdown": (
        lambda above: gpu_temperature.judge(field("gpu_temp_tlimit", f"{-2 - above} C")),
        lambda above: gpu_temperature.judge(field("gpu_temp", f"{89 + above} C", "A100-SXM4-80GB")),
    ),
    "nvlinks_inactive": (inactive,),
    **{name: (counter(name),) for name in THRESHOLDS if name[0].isupper()},
}


# As the sources have them; what is not here is 1: nothing of it is well.
LIMITS = {"sram_correctable": 10_001, "dram_correctable": 20_000_001, "degrees_above_slowdown": 0}


def test_the_limits_are_those_of_their_sources() -> None:
    assert {name: row.limit for name, row in THRESHOLDS.items()} == {**dict.fromkeys(BY_THRESHOLD, 1), **LIMITS}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_value_at_its_threshold_is_a_fault_and_one_less_is_none(name: str) -> None:
    limit = THRESHOLDS[name].limit
    for verdict in BY_THRESHOLD[name]:
        assert verdict(limit - 1).state == HEALTHY
        assert verdict(limit).state == UNHEALTHY
        assert verdict(limit + 1).state == UNHEALTHY


def test_every_threshold_says_where_it_is_from() -> None:
    assert set(BY_THRESHOLD) == set(THRESHOLDS)
    for row in THRESHOLDS.values():
        assert len(row.source) > 10
        assert re.fullmatch(r"20\d\d-\d\d", row.as_of)


# --- what other drivers show -----------------------------------------------------------------------------------------

DEPRECATED = "Requested functionality has been deprecated"


def newer(action: str) -> tools.Answer:
    """As branch 575 answers: one field instead of two, which are still there."""
    status = (
        f"<gpu_reset_status><reset_required>{DEPRECATED}</reset_required><drain_and_reset_recommended>{DEPRECATED}"
        f"</drain_and_reset_recommended></gpu_reset_status><gpu_recovery_action>{action}</gpu_recovery_action>"
    )
    return edited("<gpu_reset_status>.*?</gpu_reset_status>", status, times=0)


@pytest.mark.parametrize("number", RECOVERY_ACTIONS)
def test_every_recovery_action_but_none_is_a_fault(number: int) -> None:
    row = RECOVERY_ACTIONS[number]
    verdict = gpu_recovery_action.judge(newer(row.text))
    assert verdict.state == (UNHEALTHY if number else HEALTHY)
    assert number == 0 or f"asks for {row.text}: {row.does}" in verdict.reason


@pytest.mark.parametrize("action", ["Replace Fuse", "", "99", "Unknown Error"])
def test_a_recovery_action_that_nobody_knows_is_a_reason_for_quarantine(action: str) -> None:
    verdict = gpu_recovery_action.judge(newer(action))
    assert verdict.state == UNHEALTHY
    assert f"unknown here: {QUARANTINE}" in verdict.reason


@pytest.mark.parametrize("action", ["N/A", DEPRECATED])
def test_a_recovery_action_that_is_not_told_is_not_none(action: str) -> None:
    assert gpu_recovery_action.judge(newer(action)).state == UNHEALTHY


def test_the_older_names_are_read_as_well() -> None:
    older = edited("clocks_event_reason", "clocks_throttle_reason", times=0)
    assert clocks_event_reasons.judge(older).state == HEALTHY
    low = older.text.replace("_hw_slowdown>Not Active", "_hw_slowdown>Active", 1)
    assert "held down: hw_slowdown" in clocks_event_reasons.judge(tools.Answer(True, low)).reason
    parts = r"<sram_uncorrectable_parity>0</sram_uncorrectable_parity>\s*<sram_uncorrectable_secded>0<[^>]*>"
    bare = re.sub("<sram_threshold_exceeded>No</sram_threshold_exceeded>", "", recorded()[0])
    for count, state in ((0, HEALTHY), (1, UNHEALTHY)):
        whole = re.sub(parts, f"<sram_uncorrectable>{count}</sram_uncorrectable>", bare)
        assert ecc_errors.judge(tools.Answer(True, whole)).state == state


def test_a_clocks_event_reason_that_nobody_knows_is_told() -> None:
    more = edited("<clocks_event_reasons>", r"\g<0><clocks_event_reason_edpp>Active</clocks_event_reason_edpp>")
    verdict = clocks_event_reasons.judge(more)
    assert verdict.state == DEGRADED
    assert "edpp, which is not known here" in verdict.reason


def test_a_reason_that_is_not_there_or_not_active_holds_nothing_down() -> None:
    assert clocks_event_reasons.judge(without("clocks_event_reason_sync_boost")).state == HEALTHY
    more = edited("<clocks_event_reasons>", r"\g<0><clocks_event_reason_edpp>Not Active</clocks_event_reason_edpp>")
    assert clocks_event_reasons.judge(more).state == HEALTHY


def test_turing_retires_pages_instead_of_rows() -> None:
    assert remapped_rows.judge(tools.Answer(True, recorded("T4")[0])).state == HEALTHY
    for name in ("pending_retirement", "pending_blacklist"):
        waiting = re.sub(f"<{name}>[^<]*<", f"<{name}>Yes<", recorded("T4")[0])
        assert "retired at the next reset" in remapped_rows.judge(tools.Answer(True, waiting)).reason


# --- what cannot be read is not health -------------------------------------------------------------------------------

MISSING = {
    ecc_errors: ("ecc_mode", "ecc_errors", "dram_uncorrectable", "sram_uncorrectable_secded", "sram_correctable"),
    remapped_rows: ("remapped_rows", "remapped_row_pending", "remapped_row_failure", "retired_pages"),
    pcie_link: ("current_link_width", "max_link_width", "current_link_gen", "max_link_gen", "performance_state"),
    clocks_event_reasons: (
        "clocks_event_reasons",
        "clocks_event_reason_hw_slowdown",
        "clocks_event_reason_hw_thermal_slowdown",
        "clocks_event_reason_hw_power_brake_slowdown",
        "clocks_event_reason_sw_thermal_slowdown",
    ),
    gpu_temperature: ("temperature", "gpu_temp", "gpu_temp_tlimit", "gpu_temp_slow_tlimit_threshold"),
    gpu_recovery_action: ("gpu_reset_status", "reset_required", "drain_and_reset_recommended"),
}


def cases() -> Iterator[Any]:
    for probe, names in MISSING.items():
        for name in names:
            yield pytest.param(probe, name, id=f"{probe.CHECK}-{name}")


@pytest.mark.parametrize(("probe", "name"), list(cases()))
def test_a_field_that_is_not_there_or_holds_an_error_is_not_health(probe: Any, name: str) -> None:
    missing = probe.judge(without(name))
    assert missing.state == UNHEALTHY
    assert "does not show" in missing.reason
    failed = probe.judge(edited(rf"<{name}>.*?</{name}>", f"<{name}>Unknown Error</{name}>"))
    assert failed.state == UNHEALTHY or name == "performance_state"


@pytest.mark.parametrize(
    ("probe", "name"),
    [
        (ecc_errors, "dram_uncorrectable"),
        (ecc_errors, "sram_uncorrectable_secded"),
        (ecc_errors, "sram_correctable"),
        (remapped_rows, "remapped_row_failure"),
        (remapped_rows, "remapped_row_pending"),
        (pcie_link, "current_link_width"),
        (pcie_link, "max_link_gen"),
        (gpu_temperature, "gpu_temp"),
        (gpu_temperature, "gpu_temp_tlimit"),
        (gpu_recovery_action, "reset_required"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.CHECK,
)
def test_n_a_is_not_health_where_the_gpu_says_that_it_has_the_value(probe: Any, name: str) -> None:
    assert probe.judge(field(name, "N/A")).state == UNHEALTHY


@pytest.mark.parametrize("name", ["gpu_temp", "gpu_temp_slow_threshold"])
def test_a_temperature_without_its_other_half_is_not_health(name: str) -> None:
    assert "is N/A" in gpu_temperature.judge(field(name, "N/A", "A100-SXM4-80GB")).reason


def test_what_was_read_and_what_was_not_there_is_in_the_verdict() -> None:
    verdict = pcie_link.judge(field("max_link_gen", "N/A"))
    assert "max_link_gen is N/A" in verdict.reason
    assert verdict.found[FIRST]["pci/pci_gpu_link_info/link_widths/current_link_width"] == "16x"
    assert verdict.found[FIRST]["pci/pci_gpu_link_info/pcie_gen/max_link_gen"] == "N/A"


def test_a_gpu_without_ecc_counts_no_errors() -> None:
    counters = "|".join(("sram_correctable", r"sram_uncorrectable\w*", r"dram_\w+", "sram_threshold_exceeded"))
    off = re.sub(rf"<({counters})>[^<]*<", r"<\1>N/A<", recorded()[0])
    assert ecc_errors.judge(tools.Answer(True, off)).state == UNHEALTHY
    assert ecc_errors.judge(tools.Answer(True, off.replace("_ecc>Enabled<", "_ecc>Disabled<"))).state == HEALTHY


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (tools.Answer(False, "nvidia-smi is not installed"), "nvidia-smi is not installed"),
        (tools.Answer(False, "nvidia-smi did not answer in 60 s"), "did not answer"),
        (tools.Answer(True, ""), "tells nothing of the GPUs"),
        (tools.Answer(True, "<nvidia_smi_log><attached_gpus>"), "tells nothing of the GPUs"),
        (tools.Answer(True, "</nvidia_smi_log>"), "tells nothing of the GPUs"),
        (tools.Answer(True, "<nvidia_smi_log><gpu></nvidia_smi_log>"), "is no XML"),
        (tools.Answer(True, "<nvidia_smi_log><attached_gpus>0</attached_gpus></nvidia_smi_log>"), "0 GPUs"),
        (tools.Answer(True, "<nvidia_smi_log></nvidia_smi_log>"), "an unknown number"),
    ],
)
def test_no_answer_is_not_health(answer: tools.Answer, words: str) -> None:
    for probe in FAMILY:
        verdict = probe.judge(answer)
        assert verdict.state == UNHEALTHY
        assert words in verdict.reason


def test_a_gpu_that_is_attached_and_not_told_of_is_not_health() -> None:
    for probe in FAMILY:
        for attached in (7, 9):
            verdict = probe.judge(field("attached_gpus", attached))
            assert f"tells of 8 GPUs, {attached} are attached" in verdict.reason


def test_an_answer_that_ended_in_an_error_is_none_however_much_it_told() -> None:
    for probe in FAMILY:
        assert probe.judge(tools.Answer(False, recorded()[0])).state == UNHEALTHY


def test_what_nvidia_smi_warns_of_does_not_hide_its_answer() -> None:
    warned = f"{recorded()[0]}\nWARNING: infoROM is corrupted at gpu 0000:19:00.0"
    assert ecc_errors.judge(tools.Answer(True, warned)).state == HEALTHY


def test_nvidia_smi_is_asked_once_for_all_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> tools.Answer:
        asked.append(command)
        return tools.Answer(False, "nvidia-smi did not answer in 60 s")

    monkeypatch.setattr(tools, "ask", ask)
    smi.query.cache_clear()
    try:
        assert {probe.probe().state for probe in FAMILY} == {UNHEALTHY}
    finally:
        smi.query.cache_clear()
    assert asked == [("nvidia-smi", "-q", "-x")]


# --- NVLinks ---------------------------------------------------------------------------------------------------------


def links(status: str, errors: str = "", switches: int = 0, ok: bool = True) -> Verdict:
    blocks = re.split("(?=<gpu id)", field("attached_gpus", 2).text)
    query = f"{''.join(blocks[:3])}</nvidia_smi_log>"
    for number, uuid in enumerate(re.findall("<uuid>([^<]+)<", query)):
        status, errors = (text.replace(f"UUID{number}", uuid) for text in (status, errors))
    return nvlink.judge(tools.Answer(True, query), tools.Answer(ok, status), tools.Answer(True, errors), switches)


ONE, TWO = "GPU 0: NVIDIA H100 (UUID: UUID0)\n", "GPU 1: NVIDIA H100 (UUID: UUID1)\n"
ONE_NAMELESS = "GPU 0: NVIDIA H100\n"
UP, DOWN = "\t Link 0: 26.562 GB/s\n", "\t Link 0: <inactive>\n"
NO_ERRORS = f"{ONE}\t Link 0: Replay Errors: 0\n{TWO}\t Link 0: Replay Errors: 0\n"
ALL_DOWN = "NVML: Unable to retrieve NVLink information as all links are inActive\n"


@pytest.mark.parametrize(
    ("status", "switches", "state", "words"),
    [
        ("", 0, HEALTHY, "not linked by NVLink"),
        (ONE + TWO, 0, HEALTHY, "not linked by NVLink"),
        (ONE + DOWN + TWO + DOWN, 0, HEALTHY, "not linked by NVLink"),
        (ONE + ALL_DOWN + TWO + ALL_DOWN, 0, HEALTHY, "not linked by NVLink"),
        (ONE + UP + TWO + UP, 4, HEALTHY, "2 NVLinks are active"),
        (ONE + UP + TWO + UP, 1, HEALTHY, "2 NVLinks are active"),
        (ONE + DOWN + TWO + DOWN, 1, UNHEALTHY, f"GPU {FIRST}: NVLinks are inactive: 0"),
        ("", 4, UNHEALTHY, f"GPU {FIRST}: it shows no NVLink, and there are 4 NVSwitches"),
        (ONE + DOWN + TWO + DOWN, 4, UNHEALTHY, f"GPU {FIRST}: NVLinks are inactive: 0"),
        (ONE + ALL_DOWN + TWO + UP, 0, UNHEALTHY, f"GPU {FIRST}: NVLinks are inactive: all"),
        (ONE + UP + TWO + DOWN, 0, UNHEALTHY, f"GPU {SECOND}: NVLinks are inactive: 0"),
        (ONE + UP + TWO, 4, UNHEALTHY, f"GPU {SECOND}: it shows no NVLink"),
        (ONE + UP.replace("26.562 GB/s", "Unknown Error") + TWO + UP, 0, UNHEALTHY, "'Unknown Error'"),
        (ONE + UP.replace("26.562 GB/s", "26 parsecs") + TWO + UP, 0, UNHEALTHY, "'26 parsecs'"),
        (ONE_NAMELESS + UP + TWO + DOWN, 0, UNHEALTHY, f"GPU {SECOND}: NVLinks are inactive: 0"),
        ("GPU 7: NVIDIA H100\n" + UP, 0, UNHEALTHY, "a GPU that it does not know: GPU 7"),
        ("GPU 0: NVIDIA H100 (UUID: GPU-0)\n" + UP, 0, UNHEALTHY, "a GPU that it does not know: GPU 0"),
        ("NVLink is asleep\n", 0, UNHEALTHY, "not known here: NVLink is asleep"),
    ],
)
def test_links_are_judged_where_gpus_are_linked(status: str, switches: int, state: str, words: str) -> None:
    verdict = links(status, NO_ERRORS, switches)
    assert verdict.state == state
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ("", "shows no counter"),
        (NO_ERRORS.replace("Replay", "Sunspot"), "shows no counter"),
        (NO_ERRORS.replace(": 0\n", ": N/A\n"), "is no number"),
    ],
)
def test_errors_that_are_not_counted_are_not_health(errors: str, words: str) -> None:
    verdict = links(ONE + UP + TWO + UP, errors)
    assert verdict.state == UNHEALTHY
    assert words in verdict.reason


def test_links_that_nvidia_smi_does_not_tell_of_are_not_health() -> None:
    assert "did not answer" in links("nvidia-smi did not answer in 60 s", ok=False).reason
