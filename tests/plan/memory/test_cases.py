"""Published starts: scored as they were printed, and predicted from their settings alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuyard.catalog import load_catalog
from gpuyard.cli.fit_cases import errors_of, predict_all, read_rows
from gpuyard.plan.memory.cases import FITTED, INPUTS, Row, board_named, family_of, number, summary
from gpuyard.spec.errors import RefusedError

STARTS = Path(__file__).parent / "starts.csv"
ROWS = read_rows(STARTS)
OUTCOMES = (
    "reported_kv_tokens", "reported_blocks", "reported_weights_gib", "reported_kv_gib", "total_gpu_gib",
    "non_torch_gib", "act_peak_gib", "cudagraph_gib",
)  # fmt: skip


def predicted(rows: list[Row]) -> str:
    return json.dumps([one.as_dict() for one in predict_all(rows, STARTS.parent)])


def test_predictions_are_the_same_to_the_byte_without_the_outcomes() -> None:
    blank = [{**row, **dict.fromkeys(OUTCOMES, ""), "notes": "", "source": ""} for row in ROWS]
    absurd = [{**row, **dict.fromkeys(OUTCOMES, "7.77")} for row in ROWS]
    assert predicted(list(ROWS)) == predicted(blank) == predicted(absurd)
    assert set(INPUTS).isdisjoint(OUTCOMES)


def scores(track: str, half: str) -> dict[str, float]:
    errors = errors_of(ROWS, predict_all(ROWS, STARTS.parent), STARTS.parent)
    return summary([e for e in errors if (e.track, e.half, e.prediction.row["tier"]) == (track, half, "A")])


def test_the_half_that_was_fitted() -> None:
    given, alone = scores("weights", "fitted"), scores("config", "fitted")
    assert (given["cases"], given["median"] <= 0.001, given["worst"] <= 0.013, given["coverage"]) == (
        7,
        True,
        True,
        1.0,
    )
    assert (alone["cases"], alone["median"] <= 0.006, alone["worst"] <= 0.021) == (7, True, True)


def test_the_half_that_is_only_scored() -> None:
    """Three starts are far off, all on the safe side, and docs/fit.md says why."""
    given, alone = scores("weights", "scored"), scores("config", "scored")
    assert (given["cases"], given["median"] <= 0.004, given["most_optimistic"] <= 0.02) == (12, True, True)
    assert (given["worst"] <= 0.141, given["coverage"] >= 0.9) == (True, True)
    assert (alone["cases"], alone["median"] <= 0.0025, alone["worst"] <= 0.119, alone["coverage"] >= 0.9) == (
        13,
        True,
        True,
        True,
    )


def test_a_family_is_fitted_or_scored_and_never_both() -> None:
    families = {family_of(row["model"]) for row in ROWS}
    assert {"llama", "deepseek", "opt"} <= families & set(FITTED)
    assert {"qwen", "gpt-oss", "mistral"} <= families - set(FITTED)
    assert family_of("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B") == "qwen"


def test_a_row_that_cannot_be_reckoned_says_why_and_the_others_are() -> None:
    good = {"model": "Qwen/Qwen3-8B", "gpu": "T4-16GB"}
    bad = ({"model": "no/such"}, {"gpu": "abacus"}, {}, {"tp": "3"}, {"config": "no.json"}, {"gpu_mem_util": "1.2"})
    rows = [{**good, **change} for change in bad]
    told = predict_all(rows, STARTS.parent)
    assert [one.done is None for one in told] == [True, True, False, True, True, True]
    rules = [one.reason.partition(":")[0] for one in told if one.done is None]
    assert rules == ["FIT-MODEL", "FIT-GPU", "FIT-TP", "FIT-CONFIG", "FIT-UTILIZATION"]


cells = st.one_of(
    st.text(max_size=6),
    st.integers(-5, 10**19).map(str),
    st.floats().map(str),
    st.sampled_from(["1e9", "0", "-", "n/a", "0.9 (x)"]),
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(INPUTS[2:]), cells, max_size=6))
def test_no_cell_brings_it_down(changes: dict[str, str]) -> None:
    row = {"model": "Qwen/Qwen3-0.6B", "gpu": "T4", **changes, "config": ""}
    told = predict_all([row], STARTS.parent)[0]
    assert told.done is not None or told.reason.startswith("FIT-")


def test_people_write_dtypes_in_their_own_way() -> None:
    row = {"model": "Qwen/Qwen3-0.6B", "gpu": "T4", "dtype": "BF16", "kv_dtype": "fp8 (e4m3)", "n_gpus": "2"}
    told = predict_all([row, {**row, "dtype": "bfloat16", "kv_dtype": "fp8", "tp": "2"}], STARTS.parent)
    assert told[0].done
    assert told[0].done == told[1].done
    assert told[0].done.gpus == 2


def test_measured_weights_are_an_input_of_their_own() -> None:
    row = {"model": "Qwen/Qwen3-8B", "gpu": "H100-80GB", "weights_gib": "15.5"}
    assert predict_all([row], STARTS.parent)[0].as_dict()["predicted_weights_gib"] == 15.5


def test_a_config_beside_the_file_wins_over_the_table(tmp_path: Path) -> None:
    config = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    row = {"model": "Qwen/Qwen3-8B", "gpu": "T4", "config": "config.json"}
    assert predict_all([row], tmp_path)[0].as_dict()["predicted_weights_gib"] < 0.2


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("model,tier\na,A\n", "FIT-COLUMNS"),
        ("", "FIT-COLUMNS"),
        ("model,gpu\n", "FIT-COLUMNS"),
        ("\0\n", "FIT-COLUMNS"),
    ],
)
def test_a_file_without_its_columns_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "cases.csv"
    path.write_text(text)
    with pytest.raises(RefusedError) as refused:
        read_rows(path)
    assert refused.value.rule == rule


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("none.csv", "binary.csv"):
        with pytest.raises(RefusedError) as refused:
            read_rows(tmp_path / name)
        assert refused.value.rule == "FIT-CSV"


def test_rows_with_too_many_or_too_few_cells_are_read(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("model,gpu,tp\nQwen/Qwen3-8B,T4,1,extra,cells\nQwen/Qwen3-8B\n")
    told = predict_all(read_rows(path), tmp_path)
    assert [one.done is None for one in told] == [False, True]


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("H100-80GB", "H100-SXM5-80GB", 79.18),
        ("A100-40GB", "A100-SXM4-40GB", 39.49),
        ("A100-80GB", "A100-SXM4-80GB", 79.15),
        ("RTX 4090", "GeForce-RTX-4090", 23.55),
        ("H200-141GB", "H200-SXM-141GB", 139.81),
        ("NVIDIA H100 80GB HBM3", "H100-SXM5-80GB", 79.18),
        ("NVIDIA H100 PCIe", "H100-PCIE-80GB", 79.18),
        ("RTX PRO 6000", "RTX-PRO-6000-Blackwell-Server", 94.97),
        ("RTX 6000 Ada", "RTX-6000-Ada", 47.4),
        ("V100-32GB", "V100-SXM2-32GB", 31.73),
        ("RTX A6000-48GB", "RTX A6000-48GB", 47.28),
        ("24GB card (23.67 GiB)", "24GB card (23.67 GiB)", 23.67),
        ("48GB class (not stated)", "48GB class (not stated)", 47.28),
        ("H100-80GB (77.91 GiB free at start)", "H100-SXM5-80GB", 79.18),
    ],
)
def test_the_gpu_that_people_mean(text: str, name: str, gib: float) -> None:
    board = board_named(load_catalog().gpus, text)
    assert (board.name, board.likely_gib) == (name, pytest.approx(gib))
    assert board.display is (gib < 34 and ("RTX" in text or "card" in text))


@pytest.mark.parametrize(
    ("text", "value"),
    [("40960 (model default)", 40960), ("1,024", 1024), ("0.9", 0.9), ("", None), ("compose default", None)],
)
def test_the_number_that_a_cell_begins_with(text: str, value: float | None) -> None:
    assert number(text) == value


def test_the_file_is_read_as_csv_is_written() -> None:
    assert len(ROWS) == len(list(csv.reader(io.StringIO(STARTS.read_text())))) - 1


def test_where_nobody_told_the_version_the_low_end_holds_for_those_that_take_most() -> None:
    row = {"model": "Qwen/Qwen3-8B", "gpu": "H100-80GB", "gpu_mem_util": "0.9"}
    none, old = predict_all([row, {**row, "vllm_version": "0.15.0"}], STARTS.parent)
    assert none.done and old.done
    assert none.done.kv_cache_gib_low <= old.done.kv_cache_gib_low
    assert "no version told" in none.reason
