"""`gpuyard fit`: does a model fit on a GPU, what is left for its KV cache, and how exact that is."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gpuyard.catalog import load_catalog
from gpuyard.catalog.memory import load_memory
from gpuyard.cli.fit_cases import tell_cases
from gpuyard.cli.fit_gpus import runs_not
from gpuyard.cli.fit_learned import learn
from gpuyard.cli.models import model_shape
from gpuyard.cli.refusals import FINDINGS, refusals_told
from gpuyard.cli.write import answer
from gpuyard.plan import names
from gpuyard.plan.memory.bounds import bound, refuse_training
from gpuyard.plan.memory.budget import board_of
from gpuyard.plan.memory.fit import NEWEST, Fit, Settings, quantization_of
from gpuyard.plan.memory.fit import fit as fit_on
from gpuyard.plan.memory.shape import Shape
from gpuyard.plan.memory.speculative import Draft, draft_of
from gpuyard.spec.errors import RefusedError


class Training(StrEnum):
    FULL = "full"
    LORA = "lora"


def register(app: typer.Typer) -> None:
    app.command()(fit)


def fit(
    model: Annotated[str | None, typer.Option("--model", help="ID, config.json, or a directory with one.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="As `gpuyard gpus` names it.")] = None,
    tp: Annotated[int, typer.Option("--tensor-parallel-size", "--tp")] = 1,
    pp: Annotated[int, typer.Option("--pipeline-parallel-size", "--pp")] = 1,
    dtype: Annotated[str | None, typer.Option("--dtype")] = None,
    quantization: Annotated[str | None, typer.Option("--quantization")] = None,
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype")] = "auto",
    max_model_len: Annotated[int | None, typer.Option("--max-model-len")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option("--gpu-memory-utilization")] = None,
    max_num_seqs: Annotated[int | None, typer.Option("--max-num-seqs")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option("--max-num-batched-tokens")] = None,
    block_size: Annotated[int | None, typer.Option("--block-size")] = None,
    kv_cache_memory_bytes: Annotated[int | None, typer.Option("--kv-cache-memory-bytes")] = None,
    speculative_config: Annotated[
        str | None,
        typer.Option(
            "--speculative-config",
            help='As vLLM\'s: {"method": "eagle3", "model": PATH, "num_speculative_tokens": 3}; also mtp, ngram, …',
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="vllm==VERSION; sglang or tensorrt-llm: bounds.")
    ] = f"vllm=={NEWEST}",
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager")] = False,
    weights_gib: Annotated[
        float | None, typer.Option("--weights-gib", help="Weights on one GPU, as an engine printed them.")
    ] = None,
    cases: Annotated[
        Path | None, typer.Option("--cases", help="A CSV file of starts, e.g. published ones: all at once, and scored.")
    ] = None,
    learned: Annotated[
        Path | None, typer.Option("--learned", help="A CSV file of starts of your own, to narrow the interval by.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="The log of such a start: read back, compared, kept in --learned.")
    ] = None,
    fine_tuning: Annotated[
        Training | None, typer.Option("--fine-tuning", help="full or lora: refused, with what it takes at the least.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output.")] = False,
) -> None:
    """Reckon a start of vLLM: weights, activations, CUDA graphs, and the KV cache that is left, with an interval."""
    with refusals_told(as_json):
        if cases is not None:
            tell_cases(cases, as_json)
            return
        if model is None or gpu is None:
            raise typer.BadParameter("name a --model and a --gpu, or --cases")
        shape, board = model_shape(model), board_of(names.gpu(load_catalog(), gpu))
        if fine_tuning:
            raise refuse_training(shape, board, fine_tuning)
        other = next((row for row in load_memory().others if row.engine == engine), None)
        settings = Settings(
            engine=NEWEST if other else _version(engine),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            enforce_eager=enforce_eager,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            draft=_draft(speculative_config, shape, tp),
            weights_gib=weights_gib,
        )
        if other:
            done, unable = bound(shape, board, settings, other, load_memory()), []
        else:
            done, unable = fit_on(shape, board, settings, load_memory()), runs_not(board.name, settings.engine)
        done = replace(done, findings=(*unable, *done.findings))
        if learned is not None or log is not None:
            done = learn(done, learned, log, enforce_eager, kv_cache_dtype)
        answer(as_json, done.as_dict(), _told(done))
        if unable or not done.fits:
            raise typer.Exit(FINDINGS)


def _draft(text: str | None, shape: Shape, tensor: int) -> Draft | None:
    if text is None:
        return None
    try:
        told: object = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    return draft_of(told, shape, tensor, model_shape, lambda one: quantization_of(load_memory(), one, None))


def _version(word: str) -> str:
    distribution, equals, version = word.partition("==")
    if distribution != "vllm" or not equals:
        raise RefusedError(
            "FIT-ENGINE",
            f"engine {word}",
            "it is told as vllm==VERSION, sglang or tensorrt-llm",
            f"e.g. vllm=={NEWEST}",
        )
    return version


def _bounds_told(done: Fit) -> str:
    lines = [
        f"{done.model} on {done.gpus} x {done.gpu}, {done.engine}, max-model-len {done.max_model_len}",
        f"  weights {done.weights_gib:.2f} GiB; KV cache between {done.kv_cache_gib_low:.2f} and"
        f" {done.kv_cache_gib_high:.2f} GiB, one request {done.needed_gib:.2f}",
        *(f"  {finding}" for finding in done.findings),
        _verdict(done),
    ]
    return "\n".join(lines)


def _verdict(done: Fit) -> str:
    return "fits" if done.surely else "likely fits" if done.fits else "does not fit"


def _told(done: Fit) -> str:
    def line(what: str, gib: float, note: str = "") -> str:
        return f"  {what:<22}{gib:>9.2f} GiB  {note}".rstrip()

    if not done.engine[:1].isdigit():
        return _bounds_told(done)
    count = f"{done.gpus} x " if done.gpus > 1 else ""
    asked = f"{done.gpu_memory_utilization:g} of {done.memory_gib:.2f} GiB"
    batch = f"{done.max_num_seqs} sequences, {done.max_num_batched_tokens} tokens in a batch"
    between = f"{done.kv_cache_gib_low:.2f} to {done.kv_cache_gib_high:.2f} in 90 % of starts"
    lines = [
        f"{done.model} on {count}{done.gpu}, vLLM {done.engine}, max-model-len {done.max_model_len}",
        line("asked for", done.requested_gib, asked),
        line("weights", -done.weights_gib, f"{done.draft_gib:.2f} of these the draft's" if done.draft_gib else ""),
        line("activations", -done.activation_gib, batch),
        line("not PyTorch's", -done.non_torch_gib),
        line("CUDA graphs", -done.cudagraph_gib),
        line("KV cache", done.kv_cache_gib, between),
        f"  {done.kv_cache_tokens} tokens in {done.num_blocks} blocks of {done.block_size}; one request of"
        f" {done.max_model_len}: {done.needed_gib:.2f} GiB",
        f"  {done.max_concurrency:.2f} requests of max-model-len at once",
        *(f"  {finding}" for finding in done.findings),
        _verdict(done),
    ]
    return "\n".join(lines)
