"""The rim: asks an address what the schedule says, and books how each request ended.

A client like those of the address's users: HTTP/1.1, connections kept and used again, no retry. What a retry would
hide is what the ledger is there to show.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from array import array
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TextIO

import aiohttp

from gpuyard.bench.answers import Answer, Outcome, StreamedAnswer, judge, whole_answer
from gpuyard.bench.errors import BenchError
from gpuyard.bench.ledger import Entry, Ledger
from gpuyard.bench.measures import report
from gpuyard.bench.schedule import Kind, Prompt, Request, prompts, requests

REFERENCES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of whom."""

    url: str
    """The API's base, ending in /v1."""
    key: str | None
    model: str | None
    mix: dict[Kind, float]
    seed: int
    number: int | None
    duration: float | None
    concurrency: int | None
    rate: float | None
    prompts: int
    short_tokens: int
    long_tokens: int
    patience: float
    """Longest silence of the address, in seconds."""
    any_content: bool


@dataclass(slots=True)
class Heard:
    """An answer with the times at which it came, on the clock of the event loop."""

    answer: Answer
    ended: float
    first: float | None = None
    gaps: list[float] = field(default_factory=list[float])


def run(plan: Plan, file: TextIO | None, watch: Callable[[Ledger], None]) -> dict[str, Any]:
    """Ask for references, then put the load on; the report. `watch` is called whenever a request has ended."""
    return asyncio.run(_run(plan, file, watch))


async def _run(plan: Plan, file: TextIO | None, watch: Callable[[Ledger], None]) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=plan.patience)
    # Bytes are compared, so none may be packed on the way.
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {plan.key}"} if plan.key else {})
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        address = Address(session, plan.url, plan.seed, plan.model or await first_model(session, plan.url))
        pools = prompts(plan.seed, plan.prompts, plan.short_tokens, plan.long_tokens)
        known = await references(address, {prompt for kind in plan.mix for prompt in pools[kind]}, plan.any_content)
        ids = [name for answers in known.values() for answer in answers for name in answer.ids]
        load = Load(plan, address, Ledger(file, ids), watch)
        if not plan.any_content:
            load.references = {prompt: answers[0] for prompt, answers in known.items()}
        return {"url": plan.url, "model": address.model, "seed": plan.seed, **await load.drive(pools)}


@dataclass(frozen=True, slots=True)
class Address:
    """Where to ask, and how one question is asked."""

    session: aiohttp.ClientSession
    url: str
    seed: int
    model: str

    async def ask(self, prompt: Prompt, streamed: bool) -> Heard:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
            "seed": self.seed,
        }
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        heard = Heard(Answer(), 0)
        try:
            async with self.session.post(f"{self.url}/chat/completions", json=body, allow_redirects=False) as response:
                if response.status != 200:
                    told = await response.content.read(300)
                    heard.answer.error = f"HTTP {response.status}: {told.decode(errors='replace')}"
                elif streamed:
                    await self._listen(response, heard)
                else:
                    await self._read(response, heard)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"{type(error).__name__}: {error}"
            # Before the first byte of a body there is no answer that could be lost.
            if heard.answer.ids or heard.answer.part:
                heard.answer.lost = what
            else:
                heard.answer.error = what
        heard.ended = now()
        return heard

    async def _listen(self, response: aiohttp.ClientResponse, heard: Heard) -> None:
        stream = StreamedAnswer()
        heard.answer = stream.answer
        last = 0.0
        async for piece in response.content.iter_any():
            carried, at = stream.feed(piece), now()
            if carried and heard.first is None:
                heard.first = at
                carried -= 1
            elif carried:
                heard.gaps.append(at - last)
                carried -= 1
            # Tokens that come in one piece have no gap between them.
            heard.gaps.extend([0.0] * carried)
            last = at if stream.answer.content else last
        stream.end()

    async def _read(self, response: aiohttp.ClientResponse, heard: Heard) -> None:
        body = b""
        async for piece in response.content.iter_any():
            heard.first = heard.first or now()
            heard.answer.part = True
            body += piece
        heard.answer = whole_answer(body)


class Load:
    """The requests of a plan, each sent at its time, heard to its end and booked."""

    def __init__(self, plan: Plan, address: Address, ledger: Ledger, watch: Callable[[Ledger], None]) -> None:
        self.plan = plan
        self.address = address
        self.ledger = ledger
        self.watch = watch
        self.references: dict[Prompt, Answer] = {}
        self.gaps = array("d")
        self.began = 0.0

    async def drive(self, pools: dict[Kind, list[Prompt]]) -> dict[str, Any]:
        plan = self.plan
        room = asyncio.Semaphore(plan.concurrency) if plan.concurrency else None
        self.began = now()
        with interruptible() as interrupted:
            async with asyncio.TaskGroup() as tasks:
                for request in islice(requests(plan.seed, plan.mix, pools, plan.rate), plan.number):
                    await asyncio.sleep(max(self.began + request.due - now(), 0))
                    if room:
                        await room.acquire()
                    over = plan.duration is not None and now() - self.began >= plan.duration
                    if over or interrupted.is_set():
                        break
                    task = tasks.create_task(self._one(request))
                    if room:
                        task.add_done_callback(lambda _, room=room: room.release())
        return report(self.ledger, self.gaps, now() - self.began, plan.number)

    async def _one(self, request: Request) -> None:
        self.ledger.begin(request.number)
        # With a rate, a request that waits for room waits as its user does: from when it was due.
        began = self.began + request.due if self.plan.rate else now()
        begun = datetime.now(UTC).isoformat(timespec="milliseconds")
        heard = await self.address.ask(request.prompt, request.streamed)
        answer = heard.answer
        outcome, why = judge(answer, self.references.get(request.prompt))
        name = answer.ids[0] if answer.ids else None
        if self.ledger.again(name) and outcome is Outcome.COMPLETE:
            outcome, why = Outcome.DUPLICATED, f"the completion {name} had answered another request already"
        if outcome is Outcome.COMPLETE:
            self.gaps.extend(heard.gaps)
        content = answer.content.encode()
        self.ledger.end(
            Entry(
                id=request.number,
                prompt=request.prompt.name,
                kind=request.kind.value,
                begun=begun,
                seconds=round(heard.ended - began, 4),
                ttft=round(heard.first - began, 4) if heard.first else None,
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                tokens=answer.tokens,
                finish=answer.finish,
                answer=name,
                outcome=outcome,
                why=why,
            )
        )
        self.watch(self.ledger)


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The first model that the address lists."""
    try:
        async with session.get(f"{url}/models") as response:
            told = await response.text()
            if response.status == 200:
                return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BenchError("BENCH-REACH", url, why, "see that it is up and can be reached from here") from error
    except (ValueError, LookupError, TypeError) as error:
        raise BenchError("BENCH-MODEL", url, "GET /v1/models lists no model", "name one with --model") from error
    raise BenchError(
        "BENCH-REACH", url, f"GET /v1/models answers {response.status} {told[:200]}", "see to key and address"
    )


async def references(address: Address, wanted: set[Prompt], any_content: bool) -> dict[Prompt, list[Answer]]:
    """What each prompt is answered, whole and streamed, before there is any load; both have to be the same."""
    room = asyncio.Semaphore(REFERENCES_AT_ONCE)

    async def one(prompt: Prompt) -> tuple[Prompt, list[Answer]]:
        async with room:
            whole, stream = [(await address.ask(prompt, streamed)).answer for streamed in (False, True)]
        for answer, before in ((whole, None), (stream, None if any_content else whole)):
            outcome, why = judge(answer, before)
            if outcome is not Outcome.COMPLETE:
                change = (
                    "see that it answers without load"
                    if before is None
                    else "make it repeatable (vLLM: VLLM_BATCH_INVARIANT=1), or let any content pass with --any-content"
                )
                found = f"asked {prompt.name} at temperature 0, {address.model} gives: {outcome}, {why}"
                raise BenchError("BENCH-REFERENCE", found, "there is nothing to compare answers with", change)
        return prompt, [whole, stream]

    asked = [asyncio.create_task(one(prompt)) for prompt in sorted(wanted, key=lambda prompt: prompt.name)]
    try:
        return dict(await asyncio.gather(*asked))
    finally:
        for task in asked:
            task.cancel()


@contextmanager
def interruptible() -> Generator[asyncio.Event]:
    """The first Ctrl-C lets running requests end and sends no more; the second is the usual one."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        interrupted.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def now() -> float:
    return time.monotonic()
