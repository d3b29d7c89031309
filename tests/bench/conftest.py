"""A small server of the OpenAI API that answers well, or badly in one way when it is told to."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

KEY = "k" * 32
CONTENT = [f"{hashlib.sha256(str(number).encode()).hexdigest()[:5]} " for number in range(20)]


class Engine:
    """The answer to every prompt is CONTENT. `fault` says for the number of a request what goes wrong with it."""

    def __init__(self) -> None:
        self.fault: Callable[[int], str] = lambda _: ""
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.numbers = itertools.count()
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are silent."""

            def do_GET(self) -> None:
                self.whole({"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                engine.bodies.append(body)
                engine.keys.add(self.headers["Authorization"])
                number = next(engine.numbers)
                fault = engine.fault(number)
                if fault == "refused":
                    self.whole({"error": {"message": "no engine"}}, status=503)
                elif fault == "silent close":
                    self.close_connection = True
                elif fault == "reset before the answer":
                    self.reset()
                elif body.get("stream"):
                    self.stream(number, fault)
                else:
                    self.answer(number, fault)

            def whole(self, told: dict[str, Any], status: int = 200, lie: int = 0) -> None:
                data = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data) + lie))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = self.close_connection or bool(lie)

            def answer(self, number: int, fault: str) -> None:
                content = "".join(CONTENT)
                if fault == "a wrong byte":
                    content = content[:30] + "X" + content[31:]
                message = {"message": {"content": content}, "finish_reason": "length"}
                told = {"id": f"cmpl-{number}", "choices": [message], "usage": {"completion_tokens": len(CONTENT)}}
                self.whole(told, lie=7 if fault == "shorter than said" else 0)

            def stream(self, number: int, fault: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                name = "cmpl-0" if fault == "an answer of another request" else f"cmpl-{number}"
                for place, text in enumerate(CONTENT):
                    if place == 10:
                        if fault == "reset in the middle":
                            # What has not been read yet goes with a reset.
                            time.sleep(0.2)
                            return self.reset()
                        if fault == "cut in the middle":
                            self.close_connection = True
                            return None
                        if fault == "silence":
                            time.sleep(3)
                        if fault == "an error in the middle":
                            self.send('data: {"error": {"message": "engine dead"}}\n\n')
                            break
                        if fault == "given up":
                            self.send(self.chunk(name, "", "abort"))
                            break
                        if fault == "a piece lost":
                            continue
                        if fault == "a piece twice":
                            self.send(self.chunk(name, text))
                        if fault == "goes on as another":
                            name = f"other-{number}"
                        if fault == "no event":
                            self.send("what is this\n\n")
                        if fault == "no UTF-8":
                            self.send(b'data: {"\xff"}\n\n')
                        if fault == "a wrong byte":
                            text = "X" + text[1:]
                    self.send(self.chunk(name, text))
                else:
                    if fault == "all of it twice":
                        for text in CONTENT:
                            self.send(self.chunk(name, text))
                    if fault != "no end":
                        self.send(self.chunk(name, "", "stop" if fault == "another end" else "length"))
                    usage = {"id": name, "choices": [], "usage": {"completion_tokens": len(CONTENT)}}
                    self.send(f"data: {json.dumps(usage)}\n\n")
                if fault != "not done":
                    self.send("data: [DONE]\n\n")
                if fault == "done twice":
                    self.send("data: [DONE]\n\n")
                if fault == "a byte after the end":
                    self.send("\n")
                if fault == "half an event after the end":
                    self.send("data: x")
                if fault == "not ended as HTTP ends":
                    self.close_connection = True
                    return None
                self.wfile.write(b"0\r\n\r\n")
                return None

            def chunk(self, name: str, text: str, finish: str | None = None) -> str:
                choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
                return f"data: {json.dumps({'id': name, 'choices': [choice]})}\n\n"

            def send(self, event: str | bytes) -> None:
                data = event.encode() if isinstance(event, str) else event
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()

            def reset(self) -> None:
                """Close with a RST, as the kernel of a process that was killed does."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.wfile.flush()
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
                raise ConnectionResetError

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 512

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Connections that were reset on purpose: nothing to tell of."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine()
    yield running
    running.server.shutdown()
    running.server.server_close()
