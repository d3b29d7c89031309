"""What the engine is told: vLLM's flags, read as vLLM reads them, and the knobs of the simulation.

The knobs have the names of llm-d-inference-sim (README of that project, read 2026-11-24); times are milliseconds. A
fleet spec holds vLLM's own flags alone, so each knob may also be an environment variable: `VLLM_SIM_SEED=1`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

LISTS = {"served_model_name", "failure_types"}
FAILURES = ("rate_limit", "invalid_api_key", "context_length", "server_error", "invalid_request", "model_not_found")


@dataclass(frozen=True)
class Settings:
    """One field for each flag that counts here; the others of vLLM's flags are taken and change nothing."""

    model: str = ""
    served_model_name: list[str] = field(default_factory=list[str])
    host: str = ""
    port: int = 8000
    api_key: str = ""
    shutdown_timeout: int = 0
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    seed: int = 0
    disable_uvicorn_access_log: bool = False
    enable_auto_tool_choice: bool = False
    tool_call_parser: str = ""

    mode: str = "random"
    time_to_first_token: float = 0
    time_to_first_token_std_dev: float = 0
    inter_token_latency: float = 0
    inter_token_latency_std_dev: float = 0
    prefill_overhead: float = 0
    prefill_time_per_token: float = 0
    prefill_time_std_dev: float = 0
    time_factor_under_load: float = 1
    max_waiting_queue_length: int = 1000
    kv_cache_size: int = 0
    failure_injection_rate: int = 0
    failure_types: list[str] = field(default_factory=lambda: list(FAILURES))
    control_file: str = "/var/lib/gpuyard-lab/engine.json"

    @property
    def name(self) -> str:
        return (self.served_model_name or [self.model])[0]


# vLLM's flags that a fleet spec may hold and that mean nothing without a model.
IDLE_FLAGS = (
    *("max_num_batched_tokens", "quantization", "reasoning_parser", "tokenizer", "revision", "generation_config"),
    *("enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats", "trust_remote_code"),
)
_OWN = [each.name for each in fields(Settings)]
KNOBS = set(_OWN[_OWN.index("mode") :])


class SettingsError(Exception):
    """The engine was told something that it does not understand."""


def read(arguments: list[str], environment: dict[str, str]) -> Settings:
    """The settings of a command line. What stands on it wins over the file, the file over the environment."""
    parser = _parser()
    first, _ = parser.parse_known_args(arguments)
    from_file = words_of(yaml_mapping(Path(first.config).read_text(encoding="utf-8"))) if first.config else []
    from_environment = words_of(
        {knob: environment[f"VLLM_SIM_{knob.upper()}"] for knob in KNOBS if f"VLLM_SIM_{knob.upper()}" in environment}
    )
    told = vars(parser.parse_args([*from_environment, *from_file, *_dashes(arguments)]))
    if not told["api_key"]:
        told["api_key"] = environment.get("VLLM_API_KEY", "")
    settings = Settings(**{name: told[name] for name in _OWN})
    if not settings.model:
        raise SettingsError("no model was named; give --model DIRECTORY")
    if unknown := set(settings.failure_types) - set(FAILURES):
        raise SettingsError(f"--failure-types {', '.join(sorted(unknown))}: there are {', '.join(FAILURES)}")
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="api_server.py", allow_abbrev=False)
    parser.add_argument("--config", default="")
    defaults = Settings()
    for name in _OWN:
        default: Any = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        if name in LISTS:
            parser.add_argument(flag, nargs="+", default=default)
        elif isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        elif name == "mode":
            parser.add_argument(flag, choices=("random", "echo"), default=default)
        else:
            parser.add_argument(flag, type=default.__class__, default=default)
    for name in IDLE_FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="?")
    return parser


def _dashes(arguments: list[str]) -> list[str]:
    """vLLM takes underscores in flag names too."""
    return [re.sub(r"^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in arguments]


def words_of(told: dict[str, Any]) -> list[str]:
    """A mapping as words of a command line: true is the flag alone, false is nothing, a list is several words."""
    words: list[str] = []
    for name, value in told.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]  # pyright: ignore[reportUnknownArgumentType]
        elif value is not False and value is not None:
            words.append(f"{flag}={value}")
    return words


def yaml_mapping(text: str) -> dict[str, Any]:
    """The little of YAML that a file of flags needs: a `name: value` a line, lists as JSON or as lines with dashes."""
    found: dict[str, Any] = {}
    last = ""
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not bare or bare == "---":
            continue
        entry = re.fullmatch(r"([A-Za-z][\w-]*):(?:\s+(.*))?", bare)
        item = re.fullmatch(r"\s*- (.*)", bare)
        if entry:
            last = entry[1]
            found[last] = [] if entry[2] is None else _scalar(entry[2])
        elif item and isinstance(found.get(last), list):
            found[last].append(_scalar(item[1]))
        else:
            raise SettingsError(f"line {number} of the configuration is no flag: {line!r}; write `name: value`")
    return found


def _scalar(text: str) -> Any:
    if text[:1] == "'":
        return text[1:-1].replace("''", "'")
    word = {"true": True, "false": False, "null": None, "~": None}
    if text in word:
        return word[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def settings_or_exit() -> Settings:
    try:
        return read(sys.argv[1:], dict(os.environ))
    except (SettingsError, OSError) as error:
        print(f"api_server.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
