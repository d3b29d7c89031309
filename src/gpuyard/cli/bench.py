"""The commands `gpuyard bench …`: load on an OpenAI-compatible address, one's own fleet or another."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TextIO
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gpuyard.bench.answers import Outcome
from gpuyard.bench.errors import BenchError
from gpuyard.bench.ledger import Ledger
from gpuyard.bench.schedule import Kind, mix_of
from gpuyard.cli.refusals import FINDINGS, refusals_told

TOLD = 10

app = typer.Typer(name="bench", help="Load, and what becomes of every request.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.add_typer(app)


@app.callback()
def bench() -> None:
    """Load, and what becomes of every request."""


def mix_given(text: str) -> str:
    try:
        mix_of(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}; for example short=1,long=1,streamed=2") from error
    return text


def url_given(text: str) -> str:
    """The API's base: an address with or without /v1."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.username:
        raise typer.BadParameter("an address looks like http://127.0.0.1:8080, without user, key or query in it")
    return f"{text.rstrip('/').removesuffix('/v1')}/v1"


@app.command()
def load(
    url: Annotated[str, typer.Argument(callback=url_given, help="Address of the API, e.g. http://127.0.0.1:8080.")],
    requests: Annotated[int | None, typer.Option(min=1, help="Send so many requests.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Send requests for so many seconds.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time. Without a rate: 8.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, at random moments.")] = None,
    mix: Annotated[
        str, typer.Option(callback=mix_given, help=f"Shares of {', '.join(Kind)} requests.")
    ] = "short=1,long=1,streamed=2",
    model: Annotated[str | None, typer.Option(help="Model to ask. Without it the first that is listed.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the API key. Without it the environment's OPENAI_API_KEY, if any.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Different prompts of each length.")] = 16,
    short_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a short answer.")] = 16,
    long_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a long or streamed answer.")] = 128,
    patience: Annotated[float, typer.Option(min=0.1, help="Longest silence of the address, in seconds.")] = 60,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests.")] = 0,
    any_content: Annotated[
        bool, typer.Option("--any-content", help="Do not compare contents: for engines that are not repeatable.")
    ] = False,
    ledger: Annotated[Path | None, typer.Option(help="Write a JSON line per request to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Send short, long and streamed requests; exit 1 if one does not end exactly once and complete.

    Each prompt is asked before the load, at temperature 0 and with a seed, and every answer is compared with that.
    """
    # The HTTP library takes longer to import than most of our commands take to run.
    from gpuyard.bench.client import Plan, run

    if requests is None and duration is None:
        requests = 100
    booked: Ledger | None = None
    with refusals_told(as_json), ExitStack() as stack:
        plan = Plan(
            url=url,
            key=key_of(key_file),
            model=model,
            mix=mix_of(mix),
            seed=seed,
            number=requests,
            duration=duration,
            concurrency=concurrency or (None if rate else 8),
            rate=rate,
            prompts=prompts,
            short_tokens=short_tokens,
            long_tokens=long_tokens,
            patience=patience,
            any_content=any_content,
        )
        file = stack.enter_context(written(ledger)) if ledger else None
        bar = stack.enter_context(progress())
        task = bar.add_task("", total=requests)

        def watch(seen: Ledger) -> None:
            nonlocal booked
            booked = seen
            lost = len(seen.entries) - seen.counts[Outcome.COMPLETE]
            bar.update(task, completed=len(seen.entries), description=f"{lost} lost" if lost else "")

        told = run(plan, file, watch)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        tell(told)
    tell_losses(booked, ledger)
    if not told["lossless"]:
        raise typer.Exit(FINDINGS)


def key_of(file: Path | None) -> str | None:
    """The API key, from a file or the environment; a command line can be read by everybody on the machine."""
    if file is None:
        return os.environ.get("OPENAI_API_KEY")
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError("BENCH-KEY", f"{file} cannot be read", str(error), "name a file with the key") from error


def written(path: Path) -> TextIO:
    try:
        return path.open("w")
    except OSError as error:
        raise BenchError("BENCH-LEDGER", f"{path} cannot be written", str(error), "name another file") from error


def progress() -> Progress:
    """How far it is, on a terminal alone."""
    console = Console(stderr=True)
    columns = (
        TextColumn("asking"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def tell(told: dict[str, Any]) -> None:
    ends = ", ".join(f"{told[outcome]} {outcome}" for outcome in (*Outcome, "unended", "unsent"))
    typer.echo(f"{told['requests']} requests to {told['model']} in {told['seconds']} s: {ends}")
    table = Table("of complete answers", "p50", "p90", "p99")
    for name, key in (("time to first token", "ttft"), ("between tokens", "itl"), ("whole request", "latency")):
        if spread := told[f"{key}_seconds"]:
            table.add_row(name, *(f"{seconds * 1000:.1f} ms" for seconds in spread.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    typer.echo(f"{told['requests_per_second']} requests/s, {told['tokens_per_second']} tokens/s")


def tell_losses(booked: Ledger | None, file: Path | None) -> None:
    """The first losses, each in a line."""
    lost = [entry for entry in booked.entries if entry.outcome is not Outcome.COMPLETE] if booked else []
    for entry in lost[:TOLD]:
        typer.echo(f"{entry.outcome}: request {entry.id} ({entry.kind}, {entry.begun}): {entry.why}", err=True)
    if len(lost) > TOLD:
        typer.echo(f"… and {len(lost) - TOLD} more{f', see {file}' if file else ''}", err=True)
