"""`gpuyard gpus --fits`: which GPUs a model fits on, and on how many of each."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from gpuyard.catalog import load_catalog, load_instances
from gpuyard.catalog.memory import load_memory
from gpuyard.cli.models import model_shape
from gpuyard.cli.write import answer
from gpuyard.plan import names
from gpuyard.plan.judge import Finding, Judge
from gpuyard.plan.memory.budget import Board, board_of
from gpuyard.plan.memory.fit import NEWEST, Fit, Settings, fit
from gpuyard.plan.memory.shape import Shape
from gpuyard.spec.errors import RefusedError

_WIDTHS = (1, 2, 4, 8)  # boards that one node joins


def tell_fitting(model: str, provider: str | None, as_json: bool) -> None:
    """Every GPU with the fewest that hold the model with its whole context, in the newest vLLM's defaults."""
    shape = model_shape(model)
    offered = {row.gpu for row in load_instances() if provider in (None, row.provider)}
    rows = [gpu for gpu in load_catalog().gpus if provider is None or gpu.name in offered]
    rows = [gpu for gpu in rows if not runs_not(gpu.name, NEWEST)]
    found = [done for gpu in rows if (done := _fewest(shape, board_of(gpu)))]
    keys = ("gpu", "gpus", "surely", "weights_gib", "kv_cache_gib", "kv_cache_tokens", "max_concurrency")
    told = {"model": shape.name, "gpus": [{key: getattr(done, key) for key in keys} for done in found]}
    answer(as_json, told, _text(shape, found))


def runs_not(gpu: str, version: str) -> list[Finding]:
    """Why this vLLM does not run on this GPU, whatever the memory. A version that no row has is not judged."""
    catalog = load_catalog()
    # What keeps a version from running does not depend on the day.
    judge = Judge(catalog, "2026-01-01")
    try:
        found = judge.findings(names.combination(catalog, {"gpu": gpu, "engine": f"vllm=={version}"}))
    except names.UnknownError:
        return []
    return [finding for finding in found if finding.level == "red" and finding.kind == "works"]


def _fewest(shape: Shape, board: Board) -> Fit | None:
    for width in _WIDTHS:
        try:
            done = fit(shape, board, Settings(tensor_parallel_size=width), load_memory())
        except RefusedError:
            continue
        if done.fits:
            return done
    return None


def _text(shape: Shape, found: list[Fit]) -> str:
    table = Table(title=f"{shape.name}, {shape.max_model_len} tokens", title_justify="left", box=None, pad_edge=False)
    for column in ("GPU", "GPUs", "weights", "KV GiB", "tokens", "at once", ""):
        table.add_column(column, justify="left" if column in ("GPU", "") else "right")
    for done in found:
        sizes = f"{done.weights_gib:.1f}", f"{done.kv_cache_gib:.1f}", str(done.kv_cache_tokens)
        sure = "" if done.surely else "likely"
        table.add_row(done.gpu, str(done.gpus), *sizes, f"{done.max_concurrency:.1f}", sure)
    paper = io.StringIO()
    Console(width=80, file=paper).print(
        table if found else f"{shape.name} fits on no GPU of the catalog, not on eight of one"
    )
    return paper.getvalue().rstrip()
