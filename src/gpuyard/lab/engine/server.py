"""The engine as a program: routes, the key, and an orderly end."""

from __future__ import annotations

import asyncio
import hmac
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from . import api
from .api import Ask, Choice, Chunks, Piece, RefusedError
from .control import Control
from .core import Core, EngineDeadError, StartError, Wanted, gpus_of_the_node, memory_of
from .http import Request, Response, Server
from .metrics import Metrics
from .settings import Settings, settings_or_exit

VERSION = "0.32.0"
JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
PROMETHEUS = "text/plain; version=1.0.0; charset=utf-8"
UNCOUNTED = ("/metrics", "/health", "/load", "/ping", "/version")
Route = Callable[[Request], Awaitable[Response]]


def say(what: str) -> None:
    stamp = time.strftime("%m-%d %H:%M:%S")
    print(f"(APIServer pid={os.getpid()}) INFO {stamp} [vllm-sim] {what}", flush=True)


def as_json(value: object, status: int = 200, *, early: bool = False) -> Response:
    return Response(status, api.compact(value), JSON, early=early)


class Application:
    """What is answered to whom."""

    def __init__(self, settings: Settings, control: Control) -> None:
        self.settings = settings
        self.control = control
        memory = memory_of(settings, dict(os.environ))
        self.memory = memory
        cache = {
            "block_size": memory.block_size,
            "cache_dtype": settings.kv_cache_dtype,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "kv_cache_size_tokens": memory.tokens,
            "num_gpu_blocks": memory.blocks,
        }
        self.metrics = Metrics(settings.name, memory.max_model_len, cache)
        self.core = Core(settings, memory, self.metrics, control)
        self.names = settings.served_model_name or [settings.model]
        self.fingerprint = f"vllm-{VERSION}-{api.new_id()[:8]}"
        self.began = int(time.time())
        self.random = random.Random(settings.seed)  # noqa: S311 - dice for failures, no secret
        self.died = asyncio.Event()
        self.stopping = False
        self.routes: dict[str, dict[str, Route]] = {
            "/health": {"GET": self.health},
            "/ping": {"GET": self.health, "POST": self.health},
            "/version": {"GET": self.version},
            "/load": {"GET": self.load},
            "/metrics": {"GET": self.show_metrics},
            "/v1/models": {"GET": self.models},
            "/v1/completions": {"POST": self.completions},
            "/v1/chat/completions": {"POST": self.chat},
            "/tokenize": {"POST": self.tokenize},
            "/detokenize": {"POST": self.detokenize},
        }

    async def answer(self, request: Request) -> Response:
        if not self.may(request):
            return as_json({"error": "Unauthorized"}, 401, early=True)
        methods = self.routes.get(request.path)
        if methods is None:
            response = self.not_found(request)
        elif request.method not in methods:
            response = as_json({"detail": "Method Not Allowed"}, 405)
            response.headers["allow"] = ", ".join(methods)
        else:
            try:
                self.refuse_while_stopping(request)
                response = await methods[request.method](request)
            except RefusedError as refused:
                response = as_json(refused.body, refused.code, early=refused.code == 500)
            except EngineDeadError as dead:
                self.died.set()
                refused = RefusedError(str(dead), "InternalServerError", code=500)
                response = as_json(refused.body, 500)
            except (TypeError, ValueError, OverflowError) as error:
                # What nobody thought of is the client's mistake, as the real server has it.
                response = as_json(RefusedError(str(error)).body, 400)
        if request.path not in UNCOUNTED:
            known = methods and request.method in methods
            self.metrics.answered(request.path if known else "none", request.method, response.status)
        return response

    def refuse_while_stopping(self, request: Request) -> None:
        """What needs the engine fails from the first moment on, in the words of the real one; the rest answers."""
        if self.stopping and request.method == "POST" and request.path != "/ping":
            raise RefusedError("cannot schedule new futures after shutdown", "InternalServerError", code=500)

    def not_found(self, request: Request) -> Response:
        bare = request.path.rstrip("/")
        if bare in self.routes:
            there = f"http://{request.headers.get('host', '')}{bare}"
            return Response(307, headers={"content-length": "0", "location": there})
        return as_json({"detail": "Not Found"}, 404)

    def may(self, request: Request) -> bool:
        """Below /v1 only with the key, where there is one."""
        key = self.settings.api_key
        if not key or not request.path.startswith("/v1") or request.method == "OPTIONS":
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode())

    # --- what the engine says of itself

    async def health(self, _: Request) -> Response:
        return Response(503 if self.core.dead else 200)

    async def version(self, _: Request) -> Response:
        return as_json({"version": VERSION})

    async def load(self, _: Request) -> Response:
        return as_json({"server_load": 0})

    async def show_metrics(self, _: Request) -> Response:
        self.core.show()
        return Response(200, self.metrics.text().encode(), PROMETHEUS)

    async def models(self, _: Request) -> Response:
        permission = {
            "id": f"modelperm-{api.new_id()}",
            "object": "model_permission",
            "created": int(time.time()),
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        cards = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "vllm",
                "root": self.settings.model,
                "parent": None,
                "max_model_len": self.memory.max_model_len,
                "permission": [permission],
            }
            for name in self.names
        ]
        return as_json({"object": "list", "data": cards})

    # --- tokens and text

    async def tokenize(self, request: Request) -> Response:
        body = api.body_of(request.body, request.headers.get("content-type", ""))
        return as_json(api.tokenized(body, self.names, self.memory.max_model_len))

    async def detokenize(self, request: Request) -> Response:
        body = api.body_of(request.body, request.headers.get("content-type", ""))
        return as_json(api.detokenized(body, self.names))

    async def completions(self, request: Request) -> Response:
        return await self.generate(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self.generate(request, chat=True)

    async def generate(self, request: Request, *, chat: bool) -> Response:
        self.fail_at_random()
        body = api.body_of(request.body, request.headers.get("content-type", ""))
        ask = api.ask_of(
            body,
            chat=chat,
            names=self.names,
            max_model_len=self.memory.max_model_len,
            request_id=request.headers.get("x-request-id"),
            tools=self.settings.enable_auto_tool_choice and bool(self.settings.tool_call_parser),
        )
        if len(self.core.waiting) >= self.settings.max_waiting_queue_length:
            self.metrics.add("admission_rejections", 1, "max_num_queued_reqs")
            raise RefusedError("The waiting queue is full.", "ServiceUnavailableError", code=503)
        created = int(time.time())
        if ask.stream:
            return Response(kind=SSE, pieces=self.stream(ask, created))
        choices = {index: Choice(ask, index) for index in range(len(ask.prompts) * ask.n)}
        ends: dict[int, Piece] = {}
        async for piece in self.pieces(ask, choices):
            if piece.finish:
                ends[piece.index] = piece
        both = [(choice, ends[index]) for index, choice in choices.items()]
        return as_json(api.full_answer(ask, self.settings.name, created, self.fingerprint, both))

    async def stream(self, ask: Ask, created: int) -> AsyncIterator[bytes]:
        chunks = Chunks(ask, self.settings.name, created, self.fingerprint)
        choices = {index: Choice(ask, index) for index in range(len(ask.prompts) * ask.n)}
        opened = False
        try:
            async for piece in self.pieces(ask, choices):
                if not opened:
                    opened = True
                    for event in chunks.opening():
                        yield event
                yield chunks.piece(piece)
        except EngineDeadError as dead:
            self.died.set()
            yield api.error_event(RefusedError(str(dead), "InternalServerError", code=500))
            yield b"data: [DONE]\n\n"
            return
        for event in chunks.closing():
            yield event

    async def pieces(self, ask: Ask, choices: dict[int, Choice]) -> AsyncIterator[Piece]:
        """What all answers of one request say, as it comes."""
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self.one(ask, choice, queue)) for choice in choices.values()]
        left = len(tasks)
        try:
            while left:
                piece = await queue.get()
                if piece is None:
                    left -= 1
                else:
                    yield piece
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def one(self, ask: Ask, choice: Choice, queue: asyncio.Queue[Piece | None]) -> None:
        prompt = ask.prompts[choice.index // ask.n]
        seed = self.settings.seed if ask.seed is None else ask.seed
        echo = (ask.echoed or prompt) if self.settings.mode == "echo" else []
        sample = choice.index % ask.n
        most = max(ask.most, 1)
        wanted = Wanted(prompt, echo, seed, sample, most, ask.least, ask.ignore_eos, ask.n, ask.words)
        try:
            tokens = self.core.tokens(wanted)
            async for token in tokens:
                piece = choice.take(token)
                if piece.finish:
                    self.metrics.add("request_success", 1, piece.finish)
                queue.put_nowait(piece)
                if piece.finish:
                    break
            await tokens.aclose()
        finally:
            queue.put_nowait(None)

    def fail_at_random(self) -> None:
        """llm-d-inference-sim's injected failures."""
        if self.random.uniform(0, 100) >= self.settings.failure_injection_rate:
            return
        kind = self.random.choice(self.settings.failure_types)
        text = f"Injected failure: {kind}"
        raise {
            "rate_limit": RefusedError(text, "RateLimitError", code=429),
            "invalid_api_key": RefusedError(text, "AuthenticationError", code=401),
            "context_length": RefusedError(text, "BadRequestError", "messages"),
            "server_error": RefusedError(text, "ServiceUnavailableError", code=503),
            "invalid_request": RefusedError(text),
            "model_not_found": RefusedError(text, "NotFoundError", "model", 404),
        }[kind]


def refuse_without_a_driver(settings: Settings, environment: dict[str, str]) -> None:
    """Where there are GPUs, the devices of a loaded driver have to be there too. Raises StartError.

    Holding them open is the node's part: it does so for every engine of the lab."""
    gpus = gpus_of_the_node()
    chosen = environment.get("CUDA_VISIBLE_DEVICES", "")
    numbers = chosen.split(",") if chosen else [str(number) for number in range(len(gpus))]
    for name in (f"nvidia{number}" for number in numbers[: settings.tensor_parallel_size] if gpus):
        if not (Path("/dev") / name).exists():
            raise StartError(f"RuntimeError: Failed to infer device type: /dev/{name}: No such file or directory")


async def serve(settings: Settings, control: Control) -> int:
    application = Application(settings, control)
    core = application.core
    server = Server(application.answer, not settings.disable_uvicorn_access_log)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.listen(settings.host, settings.port)
    say(f"GPU KV cache size: {application.memory.tokens:,} tokens")
    say(f"Starting vLLM server on http://{settings.host or '0.0.0.0'}:{settings.port}")  # noqa: S104 - as it is told
    for path, methods in application.routes.items():
        say(f"Route: {path}, Methods: {', '.join(methods)}")
    stopping = asyncio.ensure_future(stop.wait())
    dying = asyncio.ensure_future(application.died.wait())
    await asyncio.wait({stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
    if application.died.is_set():
        # The answers that tell of it still go out.
        await asyncio.sleep(0.1)
    else:
        application.stopping = True
        await drain(core, settings.shutdown_timeout)
    for task in (stopping, dying):
        task.cancel()
    await server.close()
    say("[shutdown] API server: finished")
    return 0


async def drain(core: Core, seconds: int) -> None:
    """Let what runs end within the time. What does not is left hanging, as the real engine leaves it: it kills the part
    that generates, and its server waits for the clients to go."""
    mode = "drain" if seconds else "abort"
    say(f"[shutdown] API server: stopping engine client mode={mode} timeout={seconds}s")
    until = time.monotonic() + seconds
    while core.busy and time.monotonic() < until:
        await asyncio.sleep(0.02)
    core.frozen = True
    say(f"[shutdown] API server: engine client stopped, requests left={core.busy}")


def main() -> None:
    settings = settings_or_exit()
    control = Control(settings.control_file)
    if ends := control.now().exit_at_start:
        print(ends.get("message", ""), file=sys.stderr, flush=True)
        raise SystemExit(int(ends.get("code", 1)))
    try:
        refuse_without_a_driver(settings, dict(os.environ))
        code = asyncio.run(serve(settings, control))
    except StartError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    raise SystemExit(code)


if __name__ == "__main__":
    main()
