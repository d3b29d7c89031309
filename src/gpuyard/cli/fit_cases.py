"""`gpuyard fit --cases`: many starts at once from a CSV file, and how far each prediction is from what was printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpuyard.catalog import load_catalog
from gpuyard.catalog.memory import load_memory
from gpuyard.cli.models import known_shape, model_shape
from gpuyard.cli.write import answer
from gpuyard.plan.memory.cases import Error, Prediction, Row, error_of, predict, rows_of, summary, with_printed_weights
from gpuyard.plan.memory.shape import Shape
from gpuyard.spec.errors import RefusedError

TRACKS = ("weights", "config")
HALVES = ("fitted", "scored")


def tell_cases(path: Path, as_json: bool) -> None:
    """Predict every row, and where the file has outcomes, score them. Raises RefusedError: FIT-CSV, FIT-COLUMNS."""
    rows = read_rows(path)
    predictions = predict_all(rows, path.parent)
    told: dict[str, object] = {"cases": [prediction.as_dict() for prediction in predictions]}
    errors = errors_of(rows, predictions, path.parent)
    totals: dict[str, dict[str, float]] = {}
    if errors:
        totals = {
            f"{track}.{half}.{tier}": summary(
                [
                    error
                    for error in errors
                    if error.track == track
                    and half in (error.half, "all")
                    and tier == error.prediction.row.get("tier", "")
                ]
            )
            for track in TRACKS
            for half in (*HALVES, "all")
            for tier in ("A", "B")
        }
        told |= {"errors": [error.as_dict() for error in errors], "summary": totals}
    answer(as_json, told, _text(predictions, totals))


def read_rows(path: Path) -> Sequence[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text))
        rows = [
            {str(key): value or "" for key, value in row.items() if isinstance(value, str | None)} for row in reader
        ]
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise RefusedError("FIT-CSV", str(path), why, "name a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RefusedError("FIT-CSV", str(path), "it is no CSV in UTF-8", "save it as CSV in UTF-8") from error
    return rows_of(rows, reader.fieldnames or ())


def predict_all(rows: Sequence[Row], directory: Path) -> list[Prediction]:
    gpus, tables = load_catalog().gpus, load_memory()

    def shapes(name: str, config: str) -> Shape:
        if not config:
            return known_shape(name, loosely=True)
        beside = directory / config
        return model_shape(str(beside if beside.exists() else config))

    return [predict(row, shapes, gpus, tables) for row in rows]


def errors_of(rows: Sequence[Row], predictions: Sequence[Prediction], directory: Path) -> list[Error]:
    """Of both tracks: from the config alone, and with the weights that the engine printed."""
    printed = [given for row in rows if (given := with_printed_weights(row))]
    tracks = (("weights", predict_all(printed, directory)), ("config", predictions))
    return [error for track, made in tracks for one in made if (error := error_of(one, track))]


def _text(predictions: Sequence[Prediction], totals: Mapping[str, Mapping[str, float]]) -> str:
    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("model", "left"),
        ("GPU", "left"),
        ("weights", "right"),
        ("KV GiB", "right"),
        ("tokens", "right"),
    ):
        table.add_column(column, justify="right" if justify == "right" else "left", overflow="fold")
    for one in predictions:
        done, row = one.done, one.row
        if done is None:
            table.add_row(row["model"], row["gpu"], "-", one.reason.partition(":")[0], "-")
            continue
        kv = f"{done.kv_cache_gib:.2f} ({done.kv_cache_gib_low:.2f} to {done.kv_cache_gib_high:.2f})"
        table.add_row(row["model"], row["gpu"], f"{done.weights_gib:.2f}", kv, str(done.kv_cache_tokens))
    paper = io.StringIO()
    console = Console(width=80, file=paper, force_terminal=False)
    console.print(table)
    if totals:
        scores = Table(box=None, pad_edge=False)
        for column in ("track.half.tier", "cases", "median", "worst", "optimistic", "covered"):
            scores.add_column(column, justify="left" if column.startswith("track") else "right")
        for name, found in totals.items():
            if found["cases"]:
                keys = ("median", "worst", "most_optimistic", "coverage")
                scores.add_row(name, str(found["cases"]), *(f"{found[key]:.1%}" for key in keys))
        console.print()
        console.print(scores)
    return paper.getvalue().rstrip()
