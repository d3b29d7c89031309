"""A stand-in for EC2's instance metadata service, version 2: it serves the files of a folder to who has its token.

`refused` in the folder: it gives no token. `slow`: answers come a byte at a time, and never end. With the folder and a
port as its arguments it runs alone, on a node with the distribution's Python.
"""

from __future__ import annotations

import http.server
import sys
import threading
import time
from pathlib import Path
from typing import Any

TOKEN = "t0ken=="
SPOT, MAINTENANCE, REBALANCE = (
    "spot/instance-action",
    "events/maintenance/scheduled",
    "events/recommendations/rebalance",
)


class Imds:
    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.asked: list[str] = []
        imds = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are silent."""

            def reply(self, status: int, body: bytes) -> None:
                slow = (imds.folder / "slow").exists()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) + 1000 * slow))
                self.end_headers()
                self.wfile.write(body)
                while slow:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)

            def do_PUT(self) -> None:
                imds.asked.append(self.path)
                lasts = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                known = self.path == "/latest/api/token" and lasts and not (imds.folder / "refused").exists()
                self.reply(200 if known else 403, TOKEN.encode() if known else b"")

            def do_GET(self) -> None:
                imds.asked.append(self.path)
                if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
                    self.reply(401, b"")
                    return
                file = imds.folder / self.path.removeprefix("/latest/meta-data/")
                self.reply(200, file.read_bytes()) if file.is_file() else self.reply(404, b"<html>404</html>")

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Who does not wait for the end of an answer breaks it off."""

        self.server = Server(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def says(self, path: str, text: str | None) -> None:
        """Have it answer a path; with None as if nothing were there."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            file.unlink()
        else:
            file.write_text(text)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    Imds(Path(sys.argv[1]), int(sys.argv[2]))
    threading.Event().wait()
