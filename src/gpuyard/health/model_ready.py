"""An engine serves its model: it lists it, and generates a token. `/health` alone says neither."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from gpuyard.health.verdict import HEALTHY, INITIALIZING, UNHEALTHY, Verdict

CHECK = "check_model_ready"
DEADLINE_SECONDS = 60


def probe(url: str, model: str, key_file: str) -> Verdict:
    """Ask the engine (or the gateway) at `url`. The key is read from its file, so it stands in no argument list."""
    try:
        key = Path(key_file).read_text(encoding="utf-8").strip()
    except OSError as wrong:
        return Verdict(CHECK, UNHEALTHY, f"the key cannot be read: {key_file}: {wrong.strerror}", {"model": model})
    try:
        listed = _call(f"{url}/v1/models", key)
        wanted = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        completed = _call(f"{url}/v1/completions", key, wanted)
    except urllib.error.HTTPError as refused:
        # 503 is what an engine or a gateway says that is there but not ready.
        state = INITIALIZING if refused.code == 503 else UNHEALTHY
        return Verdict(CHECK, state, f"{refused.url} answers {refused.code}", {"model": model})
    except (OSError, ValueError) as wrong:
        return Verdict(CHECK, UNHEALTHY, f"{url} does not answer: {wrong}", {"model": model})
    return judge(model, listed, completed)


def judge(model: str, listed: Mapping[str, Any], completed: Mapping[str, Any]) -> Verdict:
    names: list[Any] = [entry.get("id") for entry in listed.get("data", [])]
    usage: Mapping[str, Any] = completed.get("usage") or {}
    tokens: int = usage.get("completion_tokens", 0)
    found: Mapping[str, Any] = {"model": model, "listed": names, "tokens": tokens}
    if model not in names:
        return Verdict(CHECK, UNHEALTHY, f"{model} is not listed; {', '.join(map(str, names)) or 'nothing'} is", found)
    if tokens < 1:
        return Verdict(CHECK, UNHEALTHY, f"{model} is listed, but generated no token", found)
    return Verdict(CHECK, HEALTHY, f"{model} is listed and generated a token", found)


def _call(url: str, key: str, body: Optional[Mapping[str, Any]] = None) -> Mapping[str, Any]:
    request = urllib.request.Request(  # noqa: S310 the address comes from the fleet's own lock, and is http
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    # A proxy of the environment has no business between a node and its own engine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=DEADLINE_SECONDS) as answer:
        return json.load(answer)
