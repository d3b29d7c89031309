"""The answer gate: an engine that did not change is never blamed, whatever else it works on; one that did never passes.

GPUYARD_ANSWER_ROUNDS has how many rounds of each are asked for; `make bench-answers` asks for 200.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contract.conftest import FILES, MODEL, Engine

pytestmark = pytest.mark.contract

ROUNDS = int(os.environ.get("GPUYARD_ANSWER_ROUNDS", "4"))
SEED = int(os.environ.get("GPUYARD_SEED", random.randrange(10**6)))  # noqa: S311 - a dice roll, not a secret


def gate(engine: Engine, baseline: Path, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, FILES / "engine_answers.py", verb, f"--baseline={baseline}", f"--port={engine.port}"]
    words += [f"--model={MODEL}", "--engine=e", "--weights=w", f"--key-file={engine.folder / 'api_key'}", *more]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def baseline(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of a quiet engine."""
    path = tmp_path_factory.mktemp("answers") / "baseline.json"
    done = gate(engine, path, "record")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return path


@contextmanager
def others(engine: Engine, count: int, dice: random.Random) -> Iterator[None]:
    """So many requests of other users at a time, each of another length."""
    over = threading.Event()

    def use(mine: random.Random) -> None:
        while not over.is_set():
            words = " ".join(str(mine.randrange(1000)) for _ in range(mine.randrange(1, 80)))
            engine.complete(prompt=words, max_tokens=mine.randrange(1, 48), temperature=mine.choice([0, 1]))

    users = [threading.Thread(target=use, args=(random.Random(dice.random()),)) for _ in range(count)]  # noqa: S311
    for user in users:
        user.start()
    try:
        yield
    finally:
        over.set()
        for user in users:
            user.join()


def test_an_engine_that_did_not_change_raises_no_alarm_whatever_else_it_works_on(
    engine: Engine, baseline: Path
) -> None:
    print(f"GPUYARD_SEED={SEED}")
    dice = random.Random(SEED)  # noqa: S311
    ties = moved = 0.0
    for number in range(ROUNDS):
        with others(engine, dice.choice([0, 1, 2, 5, 11]), dice):
            done = gate(engine, baseline, "compare")
        assert done.returncode == 0, f"round {number}: {done.stderr}"
        told = json.loads(done.stdout)
        ties, moved = ties + told["ties"], max(moved, told["logprob_moved_max"])
        assert told["compared"] > 900
    print(f"rounds={ROUNDS} alarms=0 ties={ties:.0f} logprob_moved_max={moved}")


# Only the simulated engine is wrong when asked to be.
simulated_alone = pytest.mark.parametrize("kind", ["simulated"], indirect=True, scope="session")


@pytest.fixture
def control(engine: Engine) -> Iterator[Path]:
    path = engine.folder / "control.json"
    yield path
    path.unlink(missing_ok=True)


@simulated_alone
def test_one_wrong_token_in_a_hundred_never_passes(engine: Engine, baseline: Path, control: Path) -> None:
    for seed in range(max(ROUNDS, 10)):
        control.write_text(json.dumps({"wrong_token_rate": 0.01, "seed": seed}))
        done = gate(engine, baseline, "compare")
        assert done.returncode == 1, done.stdout
        assert done.stderr.startswith("ANSWERS-WRONG"), done.stderr


@simulated_alone
def test_an_engine_a_fifth_slower_never_passes_and_one_as_fast_does(
    engine: Engine, baseline: Path, control: Path
) -> None:
    floor = "--speed-floor=0.88"
    assert gate(engine, baseline, "compare", floor).returncode == 0
    for _ in range(max(ROUNDS // 4, 2)):
        control.write_text(json.dumps({"latency_factor": 1.25}))
        done = gate(engine, baseline, "compare", floor)
        assert done.stderr.startswith("ANSWERS-SLOW"), done.stdout + done.stderr
        control.unlink()
        assert gate(engine, baseline, "compare", floor).returncode == 0


def test_answers_of_another_engine_or_model_are_not_compared(engine: Engine, baseline: Path, tmp_path: Path) -> None:
    other = gate(engine, baseline, "compare", "--weights=another")
    assert other.stderr.startswith("ANSWERS-BASELINE"), other.stderr
    assert gate(engine, tmp_path / "none", "compare").stderr.startswith("ANSWERS-BASELINE")
