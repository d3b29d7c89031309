"""The engine's metrics, by the names, labels and buckets of vLLM 0.32 (read from its package, and asked of it by the
contract suite), in the text form of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80, 160, 640, 2560),
)
NEXT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FEW = (1, 2, 5, 10, 20)
PREEMPTED = (1, 2, 3, 4, 5, 10, 20)

SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
CACHES = ("device", "host", "p2p", "disk", "external_unspecified")
QUEUES = ("max_num_queued_reqs", "max_num_queued_tokens")
REASONS = ("stop", "length", "abort", "error", "repetition")
Labels = tuple[tuple[str, str], ...]


class Family(NamedTuple):
    kind: str
    about: str
    label: str = ""
    values: Sequence[str] = ("",)
    buckets: Sequence[float] = ()
    engine: bool = True
    """Whether the samples tell which engine of the server they are of."""


def families(max_model_len: int) -> dict[str, Family]:
    """What there is. Counters are named without the `_total` that their samples carry."""
    sizes = [m * 10**e for e in range(8) for m in (1, 2, 5) if m * 10**e <= max_model_len]

    def seconds(about: str, buckets: Sequence[float] = LATENCY) -> Family:
        return Family("histogram", about, buckets=buckets)

    return {
        "estimated_flops_per_gpu": Family("counter", "Operations, by estimate; not estimated here."),
        "estimated_read_bytes_per_gpu": Family("counter", "Bytes read, by estimate; not estimated here."),
        "estimated_write_bytes_per_gpu": Family("counter", "Bytes written, by estimate; not estimated here."),
        "num_requests_running": Family("gauge", "Requests that are being generated."),
        "num_requests_waiting": Family("gauge", "Requests that wait for a place."),
        "num_requests_waiting_by_reason": Family("gauge", "The same, by reason.", "reason", ("capacity", "deferred")),
        "engine_sleep_state": Family(
            "gauge", "Whether the engine sleeps.", "sleep_state", ("awake", "weights_offloaded", "discard_all")
        ),
        "kv_cache_usage_perc": Family("gauge", "Share of the KV cache in use; 1 is all of it."),
        "prefix_cache_queries": Family("counter", "Tokens looked for in the prefix cache."),
        "prefix_cache_hits": Family("counter", "Tokens found in the prefix cache."),
        "external_prefix_cache_queries": Family("counter", "Tokens looked for in other instances' caches."),
        "external_prefix_cache_hits": Family("counter", "Tokens found in other instances' caches."),
        "mm_cache_queries": Family("counter", "Items looked for in the multi-modal cache."),
        "mm_cache_hits": Family("counter", "Items found in the multi-modal cache."),
        "num_preemptions": Family("counter", "Requests put back for lack of cache."),
        "prompt_tokens": Family("counter", "Tokens of prompts."),
        "prompt_tokens_by_source": Family("counter", "The same, by where they came from.", "source", SOURCES),
        "prompt_tokens_cached": Family("counter", "Tokens of prompts that were in a cache."),
        "prompt_tokens_cached_by_source": Family("counter", "The same, by cache.", "source", CACHES),
        "generation_tokens": Family("counter", "Tokens generated."),
        "request_success": Family("counter", "Requests that ended, by how.", "finished_reason", REASONS),
        "admission_rejections": Family("counter", "Requests that found a full queue.", "reason", QUEUES, engine=False),
        "request_prompt_tokens": Family("histogram", "Tokens of a prompt.", buckets=sizes),
        "request_generation_tokens": Family("histogram", "Tokens of an answer.", buckets=sizes),
        "iteration_tokens_total": Family("histogram", "Tokens of one step.", buckets=STEP_TOKENS),
        "request_max_num_generation_tokens": Family("histogram", "Tokens asked for.", buckets=sizes),
        "request_params_n": Family("histogram", "The parameter n.", buckets=FEW),
        "request_params_max_tokens": Family("histogram", "The parameter max_tokens.", buckets=sizes),
        "time_to_first_token_seconds": seconds("Until the first token.", FIRST_TOKEN),
        "inter_token_latency_seconds": seconds("Between two tokens.", NEXT_TOKEN),
        "request_time_per_output_token_seconds": seconds("Mean time of a token, by request.", NEXT_TOKEN),
        "e2e_request_latency_seconds": seconds("From arrival to the last token."),
        "request_queue_time_seconds": seconds("Waiting for a place."),
        "request_inference_time_seconds": seconds("From the place to the last token."),
        "request_prefill_time_seconds": seconds("From the place to the first token."),
        "request_decode_time_seconds": seconds("From the first token to the last."),
        "request_num_preemptions": Family("histogram", "How often a request was put back.", buckets=PREEMPTED),
        "request_prefill_kv_computed_tokens": Family("histogram", "Tokens computed for a prompt.", buckets=sizes),
    }


class Metrics:
    """Every sample there is from the start, as the real engine has them: a rate over a missing series is no rate."""

    def __init__(self, model: str, max_model_len: int, cache: Mapping[str, object]) -> None:
        self.families = families(max_model_len)
        self.base: Labels = (("engine", "0"), ("model_name", model))
        self.cache: Labels = tuple(sorted((name, str(value)) for name, value in {**cache, "engine": 0}.items()))
        self.created = time.time()
        self.values = {(name, value): 0.0 for name, family in self.families.items() for value in family.values}
        self.counts: dict[str, list[int]] = {
            name: [0] * (len(family.buckets) + 1) for name, family in self.families.items() if family.buckets
        }
        self.values["engine_sleep_state", "awake"] = 1.0
        self.http: dict[Labels, int] = {}

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        self.values[name, label] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        self.values[name, label] = value

    def observe(self, name: str, value: float) -> None:
        """Into the first bucket that is large enough; the text adds them up."""
        family = self.families[name]
        at = next((place for place, edge in enumerate(family.buckets) if value <= edge), len(family.buckets))
        self.counts[name][at] += 1
        self.values[name, ""] += value

    def answered(self, handler: str, method: str, status: int) -> None:
        key: Labels = (("handler", handler), ("method", method), ("status", f"{status // 100}xx"))
        self.http[key] = self.http.get(key, 0) + 1

    def text(self) -> str:
        lines = [*self._process()]
        for name, family in self.families.items():
            full = f"vllm:{name}"
            # A gauge and a histogram are called as they are; a counter's samples end in _total.
            shown = f"{full}_total" if family.kind == "counter" else full
            lines += [f"# HELP {shown} {family.about}", f"# TYPE {shown} {family.kind}"]
            if family.buckets:
                lines += self._histogram(full, name, family)
                lines += self._created(full, family)
                continue
            for value in family.values:
                lines.append(f"{shown}{self._labels(family, value)} {self.values[name, value]!r}")
            if family.kind == "counter":
                lines += self._created(full, family)
        lines += ["# HELP vllm:cache_config_info The KV cache, as labels.", "# TYPE vllm:cache_config_info gauge"]
        lines.append(f"vllm:cache_config_info{_braces(self.cache)} 1.0")
        lines += ["# HELP http_requests_total Requests answered.", "# TYPE http_requests_total counter"]
        lines += [f"http_requests_total{_braces(key)} {float(count)!r}" for key, count in sorted(self.http.items())]
        return "\n".join(lines) + "\n"

    def _labels(self, family: Family, value: str, *more: tuple[str, str]) -> str:
        own: Labels = ((family.label, value),) if family.label else ()
        base = self.base if family.engine else self.base[1:]
        return _braces(tuple(sorted((*base, *own, *more))))

    def _histogram(self, full: str, name: str, family: Family) -> list[str]:
        lines: list[str] = []
        below = 0
        for edge, count in zip([*map(float, family.buckets), float("inf")], self.counts[name]):  # noqa: B905 - Python 3.9
            below += count
            label = "+Inf" if edge == float("inf") else repr(edge)
            lines.append(f"{full}_bucket{self._labels(family, '', ('le', label))} {float(below)!r}")
        lines.append(f"{full}_count{self._labels(family, '')} {float(below)!r}")
        lines.append(f"{full}_sum{self._labels(family, '')} {self.values[name, '']!r}")
        return lines

    def _created(self, full: str, family: Family) -> list[str]:
        lines = [f"# HELP {full}_created When it was made.", f"# TYPE {full}_created gauge"]
        lines += [f"{full}_created{self._labels(family, value)} {self.created!r}" for value in family.values]
        return lines

    def _process(self) -> list[str]:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            resident = int(file.read().split()[1]) * 4096
        samples = {
            "process_resident_memory_bytes": ("gauge", "Memory in use.", float(resident)),
            "process_start_time_seconds": ("gauge", "When the process started.", self.created),
            "process_cpu_seconds_total": ("counter", "Processor time spent.", time.process_time()),
        }
        lines: list[str] = []
        for name, (kind, about, value) in samples.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {value!r}"]
        return lines


def _braces(labels: Labels) -> str:
    quoted = ((name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in quoted) + "}"
