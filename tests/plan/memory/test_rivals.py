"""The same starts by the formulas of other calculators."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuyard.cli.fit_cases import errors_of, predict_all, read_rows
from gpuyard.cli.models import known_shape
from tools.fit_rivals import RIVALS, beside

STARTS = Path(__file__).parent / "starts.csv"


@pytest.mark.parametrize("half", ["fitted", "scored"])
def test_ours_is_ahead_of_each_in_median_and_worst(half: str) -> None:
    rows = read_rows(STARTS)
    errors = errors_of(rows, predict_all(rows, STARTS.parent), STARTS.parent)
    told = beside(
        [e for e in errors if (e.track, e.half, e.prediction.row["tier"]) == ("weights", half, "A")], known_shape
    )
    ours = told.pop("gpuyard")
    assert set(told) == set(RIVALS)
    for name, theirs in told.items():
        assert theirs["cases"] == ours["cases"] >= 7
        assert ours["median"] * 3 < theirs["median"], name
        assert ours["worst"] < theirs["worst"], name
