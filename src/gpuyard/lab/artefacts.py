"""The lab's artefact server: the signed apt repository and the model files, read-only, on the bridge alone."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class _Artefacts(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def __init__(self, *args: Any, who: str, views: Path, roots: dict[str, Path], **rest: Any) -> None:
        self.who = who.encode()
        self.views = views
        self.roots = roots
        super().__init__(*args, **rest)

    def do_GET(self) -> None:
        if self.path != "/health":
            # What a client has may be younger than what it should have now: views come and go.
            del self.headers["If-Modified-Since"]
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.who)))
        self.end_headers()
        self.wfile.write(self.who)
        return None

    def translate_path(self, path: str) -> str:
        """The file behind a path: below one of the roots, or nothing that exists."""
        words = [word for word in unquote(urlsplit(path).path).split("/") if word not in {"", "."}]
        root = self.seen_by(str(self.client_address[0]), words[0]) if words else None
        # No artefact has a name with a dot at its front; this keeps `..` and half-written files out.
        if root is None or any(word.startswith(".") or "\0" in word for word in words):
            return "/nonexistent"
        return str(root.joinpath(*words[1:]))

    def seen_by(self, client: str, name: str) -> Path | None:
        """A root as this client sees it: a fault may have given it a view of its own."""
        own = self.views / client / name
        return own if not name.startswith(".") and own.is_dir() else self.roots.get(name)


def main(arguments: list[str]) -> None:
    """Serve `name=folder …` on `address:port`; /health answers with `who`, the very words we were started with."""
    address, who, views, *roots = arguments
    host, port = address.rsplit(":", 1)
    folders = {name: Path(folder) for name, _, folder in (root.partition("=") for root in roots)}
    handler = partial(_Artefacts, who=who, views=Path(views), roots=folders)
    ThreadingHTTPServer((host, int(port)), handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
