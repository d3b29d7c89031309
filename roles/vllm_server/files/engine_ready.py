#!/usr/bin/python3
"""Wait until an engine serves: healthy, the model listed, one token generated.

A healthy answer alone says that the program listens, not that it can generate. Run by the unit after the start, so that
`active` means `answers`. Prints what it waits for, and ends with 1 when the time is up or the engine has died.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
from pathlib import Path


class NotYet(Exception):  # noqa: N818 - a state on the way, not an error
    """The engine does not serve yet; the text says what is missing."""


class Silent(NotYet):
    """It is healthy by its own word, and does not generate."""


class Engine:
    """One engine on this machine, asked as a client would."""

    def __init__(self, port: int, key: str, patience: float) -> None:
        self.port = port
        self.key = key
        self.patience = patience

    def ask(self, method: str, path: str, body: object = None) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise NotYet(f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise NotYet(f"{method} {path} answers {response.status}: {text[:200]}")
        return text

    def check(self, model: str) -> str:
        """One look; returns the token that the engine generated."""
        self.ask("GET", "/health")
        try:
            listed = [entry["id"] for entry in json.loads(self.ask("GET", "/v1/models"))["data"]]
            if model not in listed:
                raise NotYet(f"GET /v1/models lists {listed}, not {model}")
            asked = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
            choice = json.loads(self.ask("POST", "/v1/completions", asked))["choices"][0]
            return choice["text"]
        except NotYet as missing:
            raise Silent(str(missing)) from missing
        except (ValueError, LookupError, TypeError) as error:
            raise Silent(f"an answer has not the form of the OpenAI API: {error!r}") from error


def alive(pid: int) -> bool:
    """Whether a process is there. Asked by signal: inside the sandbox /proc hides the processes of others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def wait(engine: Engine, model: str, pid: int, seconds: float, first_token: float, pause: float = 1.0) -> int:
    """Ask again and again until the deadline; say what is missing whenever that changes.

    Weights take minutes to load, and an engine that hangs is healthy all the while: from its first healthy answer on,
    the shorter deadline `first_token` holds.
    """
    began = time.monotonic()
    healthy: float | None = None
    told = ""
    while True:
        spent = time.monotonic() - began
        try:
            token = engine.check(model)
        except Silent as missing:
            what = str(missing)
            healthy = spent if healthy is None else healthy
        except NotYet as missing:
            what = str(missing)
            healthy = None
        else:
            print(f"{model} serves: first token {token!r} after {spent:.0f} s", flush=True)
            return 0
        if not alive(pid):
            print(
                f"SERVE-DIED: the process {pid} of the engine ended before {model} served; its last words stand above"
            )
            return 1
        silent = time.monotonic() - began - (healthy or 0)
        if healthy is not None and silent >= first_token:
            print(f"SERVE-SILENT: {model} has been healthy for {silent:.0f} s and generates nothing: {what}")
            return 1
        if spent >= seconds:
            print(
                f"SERVE-READY: {model} does not serve after {spent:.0f} s, last seen: {what}; look above for the reason"
            )
            return 1
        if what != told:
            print(f"waiting for {model}, {spent:.0f} of {seconds:.0f} s: {what}", flush=True)
            told = what
        time.sleep(pause)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--first-token", type=float, default=120, help="seconds, from its first healthy answer")
    parser.add_argument("--key-file", type=Path, required=True)
    options = parser.parse_args()
    key = options.key_file.read_text(encoding="utf-8").strip()
    engine = Engine(options.port, key, patience=30)
    return wait(engine, options.model, options.pid, options.seconds, options.first_token)


if __name__ == "__main__":
    sys.exit(main())
