#!/usr/bin/python3
"""Whether an engine still answers as it did: the same prompts, the same tokens, as likely, as fast.

    engine_answers.py record  --baseline FILE …   ask twice, see that both are the same, write down the answers
    engine_answers.py compare --baseline FILE …   ask again and hold the answers against those written down

A driver can be loaded, healthy, and wrong. Greedy answers of one engine on one node do not change by themselves, but
for ties: where two tokens are as good as equally likely, the order of additions decides, and that depends on what else
runs. So a token that differs is let pass when the baseline had it as runner-up within a hair; the comparison then goes
on from the baseline's own words. Everything else is a deviation, and one is enough: random errors in 1 % of the tokens
are missed by 1,024 compared tokens once in 29,000 rounds.

Prints what was found as JSON; ends with 1 and a refusal on stderr when the answers are others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

from engine_ready import Engine, NotYet

VERSION = 1
TOKENS = 64
AT_ONCE = 4
# What may be a tie: the runner-up of the baseline, so many nats behind. Measured on the CPU; on a GPU unverified.
TIE_NATS = 0.25
# How far the log probability of the same token may move.
EPSILON_NATS = 0.25
# Ties in one answer; more of them are no accident.
TIES = 8
# A token that comes so often in a row in most answers is no language.
RUN = 24

PROMPTS = (
    "The capital of France is",
    "Water boils at sea level at a temperature of",
    "A short list of the planets, from the sun outwards:",
    "def fibonacci(n):\n    ",
    "SELECT name, count(*) FROM orders",
    "Once upon a time, in a village by the sea, there lived",
    "Translate into German: The weather is fine today.\n",
    "1, 2, 4, 8, 16, 32,",
    "Question: If a train leaves at noon and travels 60 miles an hour, how far is it by three?\nAnswer:",
    "The three laws of motion state that",
    "Dear Sir or Madam,\n\nI am writing to",
    '{"name": "Ada", "born": 1815, "known_for": [',
    "In summary, the main advantages of regular exercise are",
    "The opposite of hot is cold. The opposite of up is",
    "To make bread you need flour, water, salt and yeast. First",
    # Long enough that reading it is work of its own.
    " ".join(f"Item {number} costs {number * 7 % 91} and weighs {number * 13 % 57}." for number in range(1, 25))
    + " Item 7 costs",
)


class Wrong(Exception):  # noqa: N818 - told as a refusal, not as an error of the program
    """The text is the refusal."""


class Answer(NamedTuple):
    """One answer: tokens by id and text, their log probabilities, the runner-up at each place, seconds per token."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    seconds: float
    second: list[list[Any]]
    """Text and log probability of the likeliest other token, by place."""
    texts: list[str]


class Asked:
    """One model of an engine on this machine, asked greedily until the time is up."""

    def __init__(self, port: int, key: str, model: str, deadline: float) -> None:
        self.port = port
        self.key = key
        self.model = model
        self.deadline = deadline

    def ask(self, prompt: object, tokens: int) -> Answer:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "seed": 0,
            "logprobs": 2,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Wrong(f"ANSWERS-TIME: {self.model} did not answer all prompts in time; it is too slow or stuck")
        began = time.monotonic()
        try:
            text = Engine(self.port, self.key, left).ask("POST", "/v1/completions", body)
        except NotYet as missing:
            raise Wrong(f"ANSWERS-NONE: {self.model} does not answer: {missing}") from missing
        return read_answer(text, time.monotonic() - began, self.model)


def read_answer(text: str, seconds: float, model: str) -> Answer:
    try:
        choice = json.loads(text)["choices"][0]
        told = choice["logprobs"]
        ids, texts, values = choice["token_ids"], told["tokens"], told["token_logprobs"]
        second = [
            max(
                ([word, value] for word, value in tops.items() if word != own),
                key=lambda pair: pair[1],
                default=["", -99.0],
            )
            for own, tops in zip(texts, told["top_logprobs"])  # noqa: B905 - Python 3.9 knows no strict
        ]
        if not len(ids) == len(texts) == len(values) == len(second) or not ids:
            raise ValueError(f"{len(ids)} ids, {len(texts)} tokens, {len(values)} log probabilities")
        return Answer(choice["prompt_token_ids"], ids, values, seconds / len(ids), second, texts)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Wrong(f"ANSWERS-FORM: {model} gives an answer in another form than vLLM's: {error!r}") from error


def ask_all(engine: Asked) -> list[Answer]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda prompt: engine.ask(prompt, TOKENS), PROMPTS))


class Found(NamedTuple):
    """What the comparison of one answer gave."""

    compared: int
    ties: int
    deviations: list[str]
    moved: list[float]
    """How far the log probability of each same token moved, in nats."""


def compare(number: int, base: Answer, now: Answer, engine: Optional[Asked]) -> Found:
    """One answer against the baseline. Behind a tie the engine is asked to go on from the baseline's words."""
    compared, ties, at = 0, 0, 0
    deviations: list[str] = []
    moved: list[float] = []
    while at < len(base.ids):
        rest = base.ids[at:]
        same = next((i for i, (a, b) in enumerate(zip(rest, now.ids)) if a != b), min(len(rest), len(now.ids)))  # noqa: B905
        moved += [abs(base.logprobs[at + i] - now.logprobs[i]) for i in range(same)]
        compared += same
        at += same
        if at == len(base.ids):
            break
        if same == len(now.ids):
            deviations.append(f"answer {number} ends after {at} of {len(base.ids)} tokens")
            break
        word, value = base.second[at]
        compared += 1
        if now.texts[same] == word and base.logprobs[at] - value <= TIE_NATS and ties < TIES:
            ties += 1
        else:
            deviations.append(f"answer {number}, token {at}: {now.texts[same]!r}, before {base.texts[at]!r}")
            break
        at += 1
        if engine is None or at == len(base.ids):
            break
        now = engine.ask(base.prompt + base.ids[:at], len(base.ids) - at)
    return Found(compared, ties, deviations, moved)


def longest_run(ids: Sequence[int]) -> int:
    longest = here = 1
    for before, token in zip(ids, ids[1:]):  # noqa: B905, RUF007 - Python 3.9 has neither
        here = here + 1 if token == before else 1
        longest = max(longest, here)
    return longest


def degenerate(answers: Sequence[Answer]) -> int:
    """In how many answers a token repeats itself as no language does."""
    return sum(longest_run(answer.ids) >= RUN for answer in answers)


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def judge(base: Sequence[Answer], now: Sequence[Answer], engine: Optional[Asked], model: str) -> dict[str, Any]:
    """What a round found. Raises Wrong where the answers are others."""
    found = [compare(number, before, after, engine) for number, (before, after) in enumerate(zip(base, now))]  # noqa: B905
    deviations = [text for one in found for text in one.deviations]
    moved = [value for one in found for value in one.moved]
    far = sum(value > EPSILON_NATS for value in moved)
    compared = sum(one.compared for one in found)
    told = {
        "compared": compared,
        "ties": sum(one.ties for one in found),
        "deviations": len(deviations),
        "logprob_moved_max": round(max(moved, default=0.0), 4),
        "logprob_moved_far": far,
    }
    if degenerate(now) > max(degenerate(base), len(now) // 2):
        raise Wrong(
            f"ANSWERS-REPEATED: in {degenerate(now)} of {len(now)} answers {model} repeats one token {RUN} times and "
            f"more, before in {degenerate(base)}. {json.dumps(told)}"
        )
    if deviations:
        raise Wrong(
            f"ANSWERS-WRONG: {len(deviations)} of {len(found)} answers of {model} are others than before: "
            f"{'; '.join(deviations[:3])}. {json.dumps(told)}"
        )
    # A log probability says what the arithmetic did before a token hides it. One that moves is noise; many are not.
    if far > compared / 100:
        raise Wrong(
            f"ANSWERS-LOGPROBS: {far} of {compared} tokens of {model} are more than {EPSILON_NATS} nats more or less "
            f"likely than before. {json.dumps(told)}"
        )
    return told


def record(engine: Asked, about: dict[str, Any], path: Path) -> dict[str, Any]:
    """Two rounds that say the same; of each answer the faster time."""
    first, again = ask_all(engine), ask_all(engine)
    if degenerate(first) > len(first) // 2:
        raise Wrong(
            f"ANSWERS-REPEATED: {engine.model} repeats one token in {degenerate(first)} of {len(first)} answers now; "
            "nothing can be held against that. Mend the engine first"
        )
    try:
        told = judge(first, again, engine, engine.model)
    except Wrong as wrong:
        raise Wrong(
            f"ANSWERS-UNSTABLE: {engine.model} answers otherwise at once, before anything was changed: {wrong}"
        ) from wrong
    kept = [one._replace(seconds=min(one.seconds, two.seconds)) for one, two in zip(first, again)]  # noqa: B905
    write(path, {"version": VERSION, **about, "answers": [one._asdict() for one in kept]})
    return {**told, "seconds_per_token": round(median([one.seconds for one in kept]), 5)}


def hold_against(
    engine: Asked, about: dict[str, Any], path: Path, floor: Optional[float], rounds: int = 3
) -> dict[str, Any]:
    """Ask, compare, and where a speed is asked for, ask again before a slow round is believed."""
    base = read(path, about)
    now = ask_all(engine)
    told = judge(base, now, engine, engine.model)
    if floor is None:
        return told
    fastest = [one.seconds for one in now]
    while True:
        share = median([before.seconds / seconds for before, seconds in zip(base, fastest)])  # noqa: B905
        rounds -= 1
        if share >= floor or rounds == 0:
            break
        again = ask_all(engine)
        judge(base, again, engine, engine.model)
        fastest = [min(seconds, one.seconds) for seconds, one in zip(fastest, again)]  # noqa: B905
    told["speed"] = round(share, 3)
    if share < floor:
        raise Wrong(
            f"ANSWERS-SLOW: {engine.model} generates {share:.0%} of the tokens per second that it did, and at least "
            f"{floor:.0%} is asked for (vllm_server_speed_floor). {json.dumps(told)}"
        )
    return told


def read(path: Path, about: dict[str, Any]) -> list[Answer]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, {VERSION} is known")
        other = [
            f"{name} {data[name]}, now {value}"
            for name, value in about.items()
            if data[name] != value and name != "driver"
        ]
        answers = [Answer(**one) for one in data["answers"]]
    except FileNotFoundError as error:
        raise Wrong(f"ANSWERS-BASELINE: {path} is not there: nothing was written down to compare with") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Wrong(f"ANSWERS-BASELINE: {path} cannot be read: {error}") from error
    if other:
        raise Wrong(f"ANSWERS-BASELINE: {path} is of {'; '.join(other)}: these answers cannot be compared")
    return answers


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    with half.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["record", "compare"])
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", required=True, help="digest of the engine's environment")
    parser.add_argument("--weights", required=True, help="path of the model's files")
    parser.add_argument("--driver", default="", help="driver that is loaded; for whoever reads the baseline")
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--speed-floor", type=float, help="share of the tokens per second that are asked for")
    options = parser.parse_args()
    key = options.key_file.read_text(encoding="utf-8").strip()
    engine = Asked(options.port, key, options.model, time.monotonic() + options.seconds)
    about = {name: getattr(options, name) for name in ("model", "engine", "weights", "driver")}
    try:
        if options.verb == "record":
            told = record(engine, about, options.baseline)
        else:
            told = hold_against(engine, about, options.baseline, options.speed_floor)
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        return 1
    print(json.dumps({"model": options.model, **told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
