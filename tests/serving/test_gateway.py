"""The gateway's real configuration in a real HAProxy, before an engine that notes every byte it gets."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.programs import program
from tests.serving.conftest import render

gateway_state = program("gateway/files/gateway_state.py")

USER_KEY = "u" * 32
OTHER_USER_KEY = "o" * 32
ENGINE_KEY = "e" * 32
AUTHORIZATION = f"Authorization: Bearer {USER_KEY}\r\n"
# Installed, or where `make setup` unpacks it.
UNPACKED = Path(os.environ.get("GPUYARD_CACHE", ""), "haproxy/bin")
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:{UNPACKED}") or ""

needs_haproxy = pytest.mark.skipif(not HAPROXY, reason="no haproxy; run `make setup`")


class FakeEngine:
    """Notes each connection's requests. Health checks are answered and counted apart."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.checks = 0
        self.healthy = True
        self.reuse = True
        self.ticks = 0
        self.sent: list[float] = []
        self.proceed = threading.Event()
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            used = False

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are silent."""

            def reply(self, body: bytes, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                engine.requests.append(("GET", self.path, dict(self.headers), b""))
                self.reply(b'{"data":[{"id":"tiny"}]}')

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if b'"prompt":"Hello"' in body:
                    engine.checks += 1
                    self.reply(b'{"choices":[{"text":"x"}]}' if engine.healthy else b'{"error":1}')
                    return
                if self.used and not engine.reuse:
                    self.close_connection = True
                    return
                self.used = True
                engine.requests.append(("POST", self.path, dict(self.headers), body))
                if b'"stream":true' in body:
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    self.event("one")
                    for _ in range(engine.ticks):
                        time.sleep(0.02)
                        engine.sent.append(time.monotonic())
                        self.event("tick")
                    engine.proceed.wait(20)
                    self.event("[DONE]")
                    self.wfile.write(b"0\r\n\r\n")
                    return
                self.reply(b'{"choices":[{"text":"Paris"}]}')

            def event(self, text: str) -> None:
                data = f"data: {text}\n\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A gateway that stops resets its connections: nothing to tell of."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def within(seconds: float, what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


class Gateway:
    """HAProxy with the role's configuration."""

    def __init__(self, folder: Path, engine: FakeEngine, models: list[str], *others: FakeEngine) -> None:
        self.engine = engine
        self.port = free_port()
        self.folder = folder
        self.socket = folder / "admin.sock"
        self.master = folder / "master.sock"
        self.variables = {
            "gateway_port": self.port,
            "gateway_max_body_mib": 1,
            "gateway_models": [
                {
                    "name": name,
                    "backend": f"model_{name}",
                    "servers": [
                        {"name": f"node-{number}", "address": "127.0.0.1", "port": one.port}
                        for number, one in enumerate([engine, *others])
                    ],
                }
                for name in models
            ],
            "gateway_api_keys": [USER_KEY, OTHER_USER_KEY],
            "gateway_engine_key": ENGINE_KEY,
            "gateway_socket": str(self.socket),
            "gateway_metrics_port": free_port(),
            "gateway_request_seconds": 2,
            "gateway_check_interval_seconds": 1,
            "__gateway_settings": str(folder),
            "__gateway_state_file": str(folder / "server-state"),
        }
        self.files = ["-f", str(folder / "secrets.cfg"), "-f", str(folder / "haproxy.cfg")]
        self.render()
        self.process: subprocess.Popen[str] | None = None

    def render(self) -> None:
        names = {
            "haproxy.cfg": "haproxy.cfg.j2",
            "secrets.cfg": "secrets.cfg.j2",
            "keys.sha256": "keys.sha256.j2",
            "haproxy.service.conf": "haproxy.service.conf.j2",
        }
        render(self.folder, "gateway", names, self.variables)

    def run(self) -> None:
        self.process = subprocess.Popen(
            [HAPROXY, "-W", *("-S", str(self.master)), *self.files],
            stdout=(self.folder / "out.log").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        within(20, "HAProxy to listen", self.socket.exists)

    def start(self) -> None:
        self.run()
        checks = self.engine.checks
        within(20, "a health check", lambda: self.status("node-0") == "UP" and self.engine.checks > checks)

    def stop(self) -> None:
        assert self.process
        self.process.terminate()
        self.process.wait(20)
        self.socket.unlink(missing_ok=True)

    def drained(self) -> list[str]:
        """Servers that an operator has drained, whether they answer or not."""
        _, header, *lines = gateway_state.ask("show servers state", str(self.socket)).strip().splitlines()
        columns = header.lstrip("# ").split()
        rows = [dict(zip(columns, line.split(), strict=False)) for line in lines]
        return [row["srv_name"] for row in rows if int(row["srv_admin_state"]) & 8]

    def status(self, server: str) -> str:
        rows = gateway_state.servers(gateway_state.ask("show stat", str(self.socket)), [], "g")
        return next(row["status"] for row in rows if row["server"] == server)

    def worker(self) -> str:
        """Process id of who answers now."""
        told = gateway_state.ask("show info", str(self.socket))
        return next(line.split()[1] for line in told.splitlines() if line.startswith("Pid:"))

    def reload(self) -> None:
        """As the unit does: the state is saved first."""
        assert self.process
        before = self.worker()
        assert self.state("save").returncode == 0
        self.process.send_signal(signal.SIGUSR2)
        within(20, "the new process", lambda: self.worker() != before)

    def state(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the keeper of run-time state, as the roles do."""
        places = ["--config", self.folder / "haproxy.cfg", "--state", self.folder / "server-state"]
        return subprocess.run(
            [sys.executable, gateway_state.__file__, *words, "--socket", self.master, *places],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def raw(self, data: bytes, seconds: float = 20) -> bytes:
        """What comes back until a whole answer is there or the gateway closes."""
        got = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            while part := connection.recv(65536):
                got += part
                head, found, body = got.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if found and length and len(body) >= int(length[1]):
                    break
        return got

    def ask(self, method: str, target: str, body: bytes = b"", headers: str = AUTHORIZATION) -> tuple[int, bytes]:
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        answer = self.raw(f"{method} {target} HTTP/1.1\r\nHost: gateway\r\n{headers}{length}\r\n".encode() + body)
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


def question(model: str = "tiny", **more: object) -> bytes:
    """A request as the OpenAI client writes it: the messages stand before the model."""
    asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "model": model, **more}
    return json.dumps(asked, separators=(",", ":")).encode()


def run_gateway(folder: Path, models: list[str]) -> Iterator[Gateway]:
    engine = FakeEngine()
    running = Gateway(folder, engine, models)
    running.start()
    yield running
    running.stop()
    engine.server.shutdown()
    engine.server.server_close()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    yield from run_gateway(tmp_path_factory.mktemp("one"), ["tiny"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    yield from run_gateway(tmp_path_factory.mktemp("two"), ["tiny", "large"])


@pytest.fixture
def gateway(one: Gateway) -> Gateway:
    one.engine.requests.clear()
    return one


@needs_haproxy
def test_haproxy_finds_nothing_to_warn_of(gateway: Gateway) -> None:
    done = subprocess.run(
        [HAPROXY, "-c", "-f", str(gateway.folder / "secrets.cfg"), "-f", str(gateway.folder / "haproxy.cfg")],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "[WARNING]" in line]
    # Before the first reload there is no state to read, and that is well.
    assert [line for line in warnings if "server state file" not in line] == []


@needs_haproxy
def test_a_known_user_gets_the_engines_answer(gateway: Gateway) -> None:
    assert gateway.ask("POST", "/v1/chat/completions", question()) == (200, b'{"choices":[{"text":"Paris"}]}')
    assert gateway.ask("GET", "/v1/models") == (200, b'{"data":[{"id":"tiny"}]}')


@needs_haproxy
def test_an_engine_sees_its_own_key_and_no_header_that_speaks_for_others(gateway: Gateway) -> None:
    strangers = "X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1\r\nCookie: a=b\r\nProxy-Authorization: x\r\n"
    gateway.ask("POST", "/v1/completions", question(), f"{AUTHORIZATION}{strangers}Content-Type: application/json\r\n")
    ((_, _, headers, body),) = gateway.engine.requests
    names = {name.lower() for name in headers}
    assert headers["authorization"] == f"Bearer {ENGINE_KEY}"
    assert names == {"host", "content-type", "content-length", "authorization", "connection"}
    assert body == question()


@needs_haproxy
def test_missing_wrong_and_doubled_keys_get_one_and_the_same_401(gateway: Gateway) -> None:
    sent = [
        "",
        "Authorization: Bearer wrong\r\n",
        f"Authorization: Bearer {USER_KEY}x\r\n",
        f"Authorization: Bearer {USER_KEY[:-1]}\r\n",
        "Authorization: Bearer \r\n",
        f"Authorization: {USER_KEY}\r\n",
        f"Authorization: Basic {USER_KEY}\r\n",
        f"Authorization: Bearer {ENGINE_KEY}\r\n",
        f"X-Api-Key: {USER_KEY}\r\n",
        AUTHORIZATION * 2,
        f"{AUTHORIZATION}Authorization: Bearer wrong\r\n",
    ]
    answers = {gateway.raw(f"GET /v1/models HTTP/1.1\r\nHost: gateway\r\n{headers}\r\n".encode()) for headers in sent}
    assert len(answers) == 1
    answer = answers.pop()
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_api_key"
    assert gateway.engine.requests == []


@needs_haproxy
def test_each_user_has_a_key_of_their_own(gateway: Gateway) -> None:
    assert gateway.ask("GET", "/v1/models", headers=f"Authorization: Bearer {OTHER_USER_KEY}\r\n")[0] == 200


OUTSIDE = [
    ("GET", "/metrics"),
    ("GET", "/health"),
    ("GET", "/docs"),
    ("GET", "/"),
    ("POST", "/tokenize"),
    ("POST", "/invocations"),
    ("POST", "/pause"),
    ("POST", "/collective_rpc"),
    ("POST", "/update_weights"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/chat/completions/batch"),
    ("DELETE", "/v1/models"),
    ("HEAD", "/v1/models"),
    ("POST", "/v1/models"),
    ("GET", "/v1/chat/completions"),
    ("OPTIONS", "/v1/chat/completions"),
    ("TRACE", "/v1/chat/completions"),
    ("POST", "//v1/chat/completions"),
    ("POST", "/V1/chat/completions"),
    ("POST", "/v1/%63hat/completions"),
    ("POST", "/v1%2fchat/completions"),
    ("POST", "/v1/../v1/chat/completions"),
    ("POST", "/v1/./chat/completions"),
    ("POST", "/v1/chat/completions/"),
    ("POST", "/v1/chat/completions;x"),
    ("POST", f"/v1/chat/completions?api_key={USER_KEY}"),
    ("POST", "http://gateway/v1/chat/completions"),
    ("CONNECT", "gateway:80"),
    ("GET", "/v1/models#x"),
]


@needs_haproxy
@pytest.mark.parametrize(("method", "target"), OUTSIDE)
def test_no_byte_of_a_request_outside_the_list_reaches_the_engine(gateway: Gateway, method: str, target: str) -> None:
    data = f"{method} {target} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n{AUTHORIZATION}".encode()
    body = question() if method == "POST" else b""
    length = f"Content-Length: {len(body)}\r\n".encode() if body else b""
    status = int(gateway.raw(data + length + b"\r\n" + body).split()[1])
    assert status in (400, 404, 405)
    assert gateway.engine.requests == []


@needs_haproxy
def test_a_body_of_200_megabytes_is_refused_unread(gateway: Gateway) -> None:
    began = time.monotonic()
    answer = gateway.raw(
        f"POST /v1/completions HTTP/1.1\r\nHost: g\r\n{AUTHORIZATION}Content-Length: 209715200\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - began < 1
    assert gateway.engine.requests == []


@needs_haproxy
def test_the_largest_body_passes_and_one_byte_more_does_not(gateway: Gateway) -> None:
    frame = len(question(pad=""))
    assert gateway.ask("POST", "/v1/completions", question(pad="x" * (2**20 - frame)))[0] == 200
    # The head alone: the refusal comes before the body is read, and a client still sending might not see it.
    head = f"POST /v1/completions HTTP/1.1\r\nHost: g\r\n{AUTHORIZATION}Content-Length: {2**20 + 1}\r\n\r\n"
    assert int(gateway.raw(head.encode()).split()[1]) == 413
    assert len(gateway.engine.requests) == 1


SMUGGLING = {
    "chunks": ("Transfer-Encoding: chunked\r\n", 411),
    "chunks and a length": ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 411),
    "no length": ("", 411),
    "two lengths": ("Content-Length: 5\r\nContent-Length: 6\r\n", 400),
    "a negative length": ("Content-Length: -1\r\n", 400),
    "a length beyond all numbers": (f"Content-Length: {10**30}\r\n", 400),
    "a length that is no number": ("Content-Length: 5x\r\n", 400),
    "a hidden header": ("Content-Length: 0\r\nTransfer-Encoding : chunked\r\n", 400),
}


@needs_haproxy
@pytest.mark.parametrize(("headers", "status"), SMUGGLING.values(), ids=SMUGGLING.keys())
def test_a_body_of_doubtful_length_reaches_nobody(gateway: Gateway, headers: str, status: int) -> None:
    answer = gateway.raw(f"POST /v1/completions HTTP/1.1\r\nHost: g\r\n{AUTHORIZATION}{headers}\r\n0\r\n\r\n".encode())
    assert int(answer.split()[1]) == status
    assert gateway.engine.requests == []


@needs_haproxy
@pytest.mark.parametrize("start", ["POST /v1/comp", f"POST /v1/completions HTTP/1.1\r\nHost: g\r\n{AUTHORIZATION}"])
def test_a_request_that_never_ends_is_cut_off(gateway: Gateway, start: str) -> None:
    data = start if "Host" not in start else f"{start}Content-Length: 100\r\n\r\nabc"
    began = time.monotonic()
    assert gateway.raw(data.encode()).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 10
    assert gateway.engine.requests == []


@needs_haproxy
def test_a_stream_passes_piece_by_piece_and_outlives_a_silence_and_a_reload(gateway: Gateway) -> None:
    gateway.engine.proceed.clear()
    body = question(stream=True)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nConnection: close\r\n{AUTHORIZATION}"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        got = b""
        while b"data: one" not in got:
            got += connection.recv(65536)
        assert gateway.process
        before = gateway.worker()
        gateway.process.send_signal(signal.SIGUSR2)  # what a reload sends
        within(20, "the new process", lambda: gateway.worker() != before)
        # Longer than a request may take to arrive: that limit must not count for the answer.
        time.sleep(2.5)
        gateway.engine.proceed.set()
        while part := connection.recv(65536):
            got += part
    assert b"data: [DONE]" in got


@needs_haproxy
def test_a_token_is_not_held_back_until_more_have_come(gateway: Gateway) -> None:
    gateway.engine.ticks = 30
    gateway.engine.proceed.set()
    body = question(stream=True)
    came: list[float] = []
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\n{AUTHORIZATION}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while part := connection.recv(65536):
            came += [time.monotonic()] * part.count(b"tick")
    gateway.engine.ticks = 0
    delays = sorted(there - gone for gone, there in zip(gateway.engine.sent, came, strict=True))
    assert delays[len(delays) // 2] < 0.05, delays


@needs_haproxy
def test_an_engine_that_listens_and_generates_nothing_is_taken_out(gateway: Gateway) -> None:
    gateway.engine.healthy = False
    try:
        within(20, "the engine to be down", lambda: gateway.status("node-0") == "DOWN")
        status, body = gateway.ask("GET", "/v1/models")
        assert (status, json.loads(body)["error"]["code"]) == (503, "no_engine")
    finally:
        gateway.engine.healthy = True
    within(20, "the engine to be up again", lambda: gateway.status("node-0") == "UP")


@needs_haproxy
def test_a_drained_server_stays_drained_over_a_restart_and_its_port_comes_from_the_configuration(
    gateway: Gateway,
) -> None:
    config, state = gateway.folder / "haproxy.cfg", gateway.folder / "server-state"
    written = config.read_text()
    port = str(free_port())
    gateway_state.ask("set server model_tiny/node-0 state drain", str(gateway.socket))
    try:
        config.write_text(written.replace(f"127.0.0.1:{gateway.engine.port}", f"127.0.0.1:{port}"))
        told = gateway_state.ask("show servers state", str(gateway.socket))
        state.write_text(gateway_state.merged(told, gateway_state.configured(config.read_text())))
        gateway.stop()
        gateway.run()
        within(20, "the server to be known as drained", lambda: gateway.drained() == ["node-0"])
        assert f" {port} " in gateway_state.ask("show servers state", str(gateway.socket))
    finally:
        config.write_text(written)
        state.unlink(missing_ok=True)
        gateway.stop()
        gateway.start()


@needs_haproxy
def test_the_configuration_that_can_be_shown_holds_no_key(gateway: Gateway) -> None:
    shown = (gateway.folder / "haproxy.cfg").read_text() + (gateway.folder / "keys.sha256").read_text()
    for key in (USER_KEY, OTHER_USER_KEY, ENGINE_KEY):
        assert key not in shown
    gateway.ask("GET", f"/v1/models?key={USER_KEY}")
    assert USER_KEY not in (gateway.folder / "out.log").read_text()


@needs_haproxy
def test_the_metrics_are_on_the_loopback_alone(gateway: Gateway) -> None:
    port = gateway.variables["gateway_metrics_port"]
    assert f"bind 127.0.0.1:{port} " in (gateway.folder / "haproxy.cfg").read_text()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b" 200 " in connection.recv(200)


@needs_haproxy
def test_several_models_are_told_apart_by_the_body(two: Gateway) -> None:
    for model in ("tiny", "large"):
        assert two.ask("POST", "/v1/chat/completions", question(model, pad="x" * 100_000))[0] == 200
    rows = gateway_state.ask("show stat", str(two.socket)).lstrip("# ").splitlines()
    columns = rows[0].split(",")
    table = [dict(zip(columns, row.split(","), strict=False)) for row in rows[1:] if row]
    served = {row["pxname"]: row["stot"] for row in table if row["svname"] == "node-0"}
    assert served == {"model_tiny": "1", "model_large": "1"}


@needs_haproxy
def test_a_model_that_nobody_serves_is_a_404_of_the_gateway(two: Gateway) -> None:
    before = len(two.engine.requests)
    for body in (question("unknown"), b"{}", b"no json", b'{"model":7}'):
        status, answer = two.ask("POST", "/v1/chat/completions", body)
        assert (status, json.loads(answer)["error"]["code"]) == (404, "model_not_found")
    assert len(two.engine.requests) == before


@needs_haproxy
def test_with_several_models_the_gateway_lists_them_itself(two: Gateway) -> None:
    status, answer = two.ask("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(answer)["data"]] == ["tiny", "large"]


STATE = """1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_fqdn srv_port srvrecord
3 model_tiny 1 node-0 10.0.0.1 2 8 - 8000 -
3 model_tiny 2 node-1 10.0.0.2 2 0 - 8000 -
"""


def test_the_saved_state_keeps_the_drain_and_takes_the_address_from_the_configuration() -> None:
    config = "frontend api\n    bind :1\nbackend model_tiny\n    server node-0 10.0.0.9:8001\n"
    saved = gateway_state.merged(STATE, gateway_state.configured(config)).splitlines()
    assert saved[2:] == ["3 model_tiny 1 node-0 10.0.0.9 2 8 - 8001 -"]


def test_a_wait_is_for_all_backends_that_have_the_server() -> None:
    rows = [
        {"server": "node-0", "status": "UP", "sessions": 0},
        {"server": "node-0", "status": "DOWN", "sessions": 2},
        {"server": "node-1", "status": "UP", "sessions": 5},
    ]
    assert not gateway_state.awaited(rows, "node-0", "idle")
    assert not gateway_state.awaited(rows, "node-0", "up")
    assert gateway_state.awaited(rows[:1] + rows[2:], "node-0", "idle")
    assert gateway_state.awaited(rows, "node-1", "up")
