"""Both engines, started by the very command of their systemd unit inside the nodes' base system, on the same model.

What a test sees is bytes: no client library smooths anything over.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpuyard.lab.place import default_cache

PROJECT = Path(__file__).resolve().parents[2]
FILES = PROJECT / "roles/vllm_server/files"
sys.path.insert(0, str(PROJECT / "tools"))

MODEL = "smollm2-135m-instruct"
KEY = secrets.token_hex(24)
CONTEXT = 2048
# What a fleet gives its engines: vLLM on a CPU takes its cache from here, the simulated one its pace.
ENVIRONMENT = {
    "real": {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"},
    "simulated": {
        "VLLM_SIM_TIME_TO_FIRST_TOKEN": "30",
        "VLLM_SIM_INTER_TOKEN_LATENCY": "10",
        "VLLM_SIM_CONTROL_FILE": "/run/credentials/control.json",
    },
}
# As the unit sets it.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HOME": "/tmp",
    "PYTHONUNBUFFERED": "1",
    "CREDENTIALS_DIRECTORY": "/run/credentials",
    "PATH": "/usr/bin:/bin",
}


@dataclass
class Reply:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    """In their order, names in lower case."""
    body: bytes

    @classmethod
    def of(cls, raw: bytes) -> Reply:
        head, _, body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join(chunks_of(body))
        return cls(int(first.split()[1]), headers, body)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; the last has to be [DONE]."""
        *events, done, nothing = self.body.decode().split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @property
    def text(self) -> str:
        return self.body.decode()


def chunks_of(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        yield rest[:length]
        assert rest[length : length + 2] == b"\r\n"
        body = rest[length + 2 :]


def as_root(*words: str | Path) -> list[str | Path]:
    return list(words) if os.geteuid() == 0 else ["sudo", "-n", *words]


class Engine:
    """An engine on this machine's loopback, in a copy of the nodes' base system that is gone when it ends."""

    def __init__(self, kind: str, shutdown_timeout: int) -> None:
        from steps import nodes

        self.kind = kind
        self.folder = Path(tempfile.mkdtemp(prefix="gpuyard-contract-"))
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
        flags = {"dtype": "float32", "enforce-eager": "true", "host": "127.0.0.1", "max-model-len": CONTEXT}
        flags |= {"model": "/var/lib/models/model", "port": self.port, "served-model-name": MODEL}
        config = self.folder / "engine.yaml"
        config.write_text("".join(f"{name}: {value}\n" for name, value in flags.items()))
        (self.folder / "api_key").write_text(KEY + "\n")
        tree = nodes.engine("cpu" if kind == "real" else "sim")
        binds = {
            default_cache() / "engines": "/opt/vllm",
            default_cache() / "models" / MODEL: "/var/lib/models/model",
            FILES: "/run/role",
            self.folder: "/run/credentials",
        }
        words: list[str | Path] = [PROJECT / "tools/in_root.sh", default_cache() / "lab/root"]
        for outside, inside in binds.items():
            words += ["--bind", "ro", outside, inside]
        settings = [f"{name}={value}" for name, value in {**OFFLINE, **ENVIRONMENT[kind]}.items()]
        words += ["--", "env", "-i", *settings, "/run/role/engine_run", f"/opt/vllm/{tree.name}/bin/python"]
        words += ["--config", "/run/credentials/engine.yaml", f"--shutdown-timeout={shutdown_timeout}"]
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.shell = subprocess.Popen(
                as_root(*words), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> None:
        """Until it generates, asked as the unit asks."""
        words = [sys.executable, FILES / "engine_ready.py", f"--port={self.port}", f"--model={MODEL}"]
        words += [f"--pid={self.shell.pid}", f"--seconds={seconds}", f"--key-file={self.folder / 'api_key'}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{self.log.read_text()[-4000:]}"

    @property
    def pid(self) -> int:
        """The engine's first process: below whatever brought it into its namespace."""
        pid = self.shell.pid
        while Path(f"/proc/{pid}/exe").resolve().name in ("sudo", "unshare", "env"):
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return pid

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str | None] | None = None,
        key: str | None = KEY,
        seconds: float = 60,
    ) -> Reply:
        """One request on a connection of its own."""
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        told: dict[str, str | None] = {"Host": "engine", "Connection": "close"}
        if key is not None:
            told["Authorization"] = f"Bearer {key}"
        if content or method == "POST":
            told |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        told |= headers or {}
        lines = [f"{name}: {value}" for name, value in told.items() if value is not None]
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + content)
            got = b""
            while data := connection.recv(65536):
                got += data
        return Reply.of(got)

    def complete(self, **more: object) -> Reply:
        return self.ask("POST", "/v1/completions", completion(**more))

    def chat(self, **more: object) -> Reply:
        return self.ask("POST", "/v1/chat/completions", conversation(**more))

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.ask("GET", "/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def terminate(self) -> None:
        subprocess.run(as_root("kill", f"-{signal.SIGTERM.value}", str(self.pid)), check=True)

    def end(self) -> None:
        if self.shell.poll() is None:
            subprocess.run(as_root("kill", "-KILL", str(self.shell.pid)), check=False)
        self.shell.wait(30)
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def completion(**more: object) -> dict[str, object]:
    asked = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0, **more}
    return {name: value for name, value in asked.items() if value is not ...}


def conversation(**more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **more}
    return {name: value for name, value in asked.items() if value is not ...}


@pytest.fixture(scope="session", params=["simulated", "real"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def starter(kind: str) -> Iterator[Callable[[int], Engine]]:
    made: list[Engine] = []

    def start(shutdown_timeout: int) -> Engine:
        engine = Engine(kind, shutdown_timeout)
        made.append(engine)
        began = time.monotonic()
        engine.wait(300)
        print(f"{kind} engine: {time.monotonic() - began:.1f} s to its first token")
        return engine

    yield start
    for engine in made:
        engine.end()


DRAIN_SECONDS = 4


@pytest.fixture(scope="session")
def engine(starter: Callable[[int], Engine]) -> Engine:
    """The engine that most cases ask; in the end it is stopped with requests in flight."""
    return starter(DRAIN_SECONDS)
