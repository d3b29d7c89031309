"""The simulated engine as a process of its own: what it can do that the real one cannot, and how light it is."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuyard.lab.engine import settings
from gpuyard.lab.engine.api import Ask, Choice
from gpuyard.lab.engine.control import Control
from gpuyard.lab.engine.tokens import EOS, answer, encode, text_of

PROJECT = Path(__file__).resolve().parents[2]
CONFIG = {
    "max_position_embeddings": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}


class Engine:
    """A running engine and its control file."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.control = folder / "control.json"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
        words = [sys.executable, "-I", "-m", "gpuyard.lab.engine.server", "--model", str(folder / "model")]
        words += ["--served-model-name=tiny", "--host=127.0.0.1", f"--port={self.port}"]
        words += [f"--control-file={self.control}", *flags]
        self.began = time.monotonic()
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=folder)

    def up(self, seconds: float = 60) -> float:
        """Wait until it answers; how long that took."""
        while time.monotonic() < self.began + seconds:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/health")[0] == 200:
                    return time.monotonic() - self.began
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        raise AssertionError(self.log.read_text())

    def fault(self, **faults: object) -> None:
        draft = self.control.with_suffix(".new")
        draft.write_text(json.dumps(faults))
        draft.replace(self.control)

    def ask(self, method: str, path: str, body: object = None, timeout: float = 60) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def says(self, prompt: str = "Hello", timeout: float = 60, **more: object) -> str:
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True, **more}
        status, text = self.ask("POST", "/v1/completions", asked, timeout)
        assert status == 200, text
        return json.loads(text)["choices"][0]["text"]

    def metric(self, name: str) -> float:
        found = re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", self.ask("GET", "/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    made: list[Engine] = []

    def one(*flags: str) -> Engine:
        made.append(Engine(tmp_path, *flags))
        return made[-1]

    yield one
    for engine in made:
        engine.end()


# --- how light it is -------------------------------------------------------------------------------------------------


def test_it_starts_within_a_second_and_takes_less_than_60_mb(start: Callable[..., Engine]) -> None:
    # The best of a few: what else a machine does at the moment is not the engine's.
    seconds = min(start().up() for _ in range(3))
    engine = start()
    engine.up()
    threads = [threading.Thread(target=engine.says, kwargs={"max_tokens": 200}) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    status = Path(f"/proc/{engine.process.pid}/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
    print(f"answers after {seconds:.2f} s, {peak:.0f} MB at most")
    assert seconds < 1
    assert peak < 60


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_same_question_has_the_same_answer_on_every_node(start: Callable[..., Engine]) -> None:
    one, other = start(), start()
    one.up()
    other.up()
    assert one.says() == other.says() == one.says()
    assert one.says("Hello") != one.says("World")
    assert one.says(seed=1) != one.says(seed=2)


def test_every_text_is_tokens_and_every_token_is_text() -> None:
    for text in ("Hello world", "Grüße, 世界 🦙\n\ttabs", "", "a" * 99):
        assert "".join(map(text_of, encode(text))) == text
    assert text_of(7) == text_of(10**20) == text_of(EOS) == ""


def test_an_answer_ends_by_itself_and_goes_on_when_the_end_is_not_wanted() -> None:
    words = answer("q", 0, "m", 0)
    first = next(place for place, token in enumerate(words) if token == EOS)
    assert 12 <= first < 64
    assert EOS in [next(words) for _ in range(100)]


def test_a_stop_string_is_found_across_tokens_and_never_shown_in_part() -> None:
    choice = Choice(Ask(chat=False, prompts=[[1]], words="", stop=["cat dog"], most=99), 0)
    pieces = [choice.take(token) for token in encode(" the cat dog")]
    assert "".join(piece.text for piece in pieces) == " the "
    assert (pieces[-1].finish, pieces[-1].stop) == ("stop", "cat dog")


def test_echo_says_what_was_asked(start: Callable[..., Engine]) -> None:
    engine = start("--mode=echo")
    engine.up()
    assert engine.says("one two", ignore_eos=False) == "one two"


# --- speed and room --------------------------------------------------------------------------------------------------


def test_time_passes_as_the_flags_say(start: Callable[..., Engine]) -> None:
    engine = start("--time-to-first-token=200", "--inter-token-latency=20")
    engine.up()
    began = time.monotonic()
    engine.says(max_tokens=11)
    took = time.monotonic() - began
    assert 0.4 <= took < 3


def test_who_finds_no_place_waits(start: Callable[..., Engine]) -> None:
    engine = start("--max-num-seqs=2", "--inter-token-latency=20")
    engine.up()
    threads = [threading.Thread(target=engine.says, kwargs={"max_tokens": 150}) for _ in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while (engine.metric("num_requests_running"), engine.metric("num_requests_waiting")) != (2, 3):
        assert time.monotonic() < deadline
    for thread in threads:
        thread.join(60)
    assert engine.metric("num_requests_running") == 0


def test_a_full_cache_puts_the_youngest_back_and_still_answers_all(start: Callable[..., Engine]) -> None:
    engine = start("--kv-cache-size=16", "--max-model-len=256", "--inter-token-latency=2")
    engine.up()
    alone = [engine.says(f"question {number}", max_tokens=200) for number in range(3)]
    together = ["", "", ""]

    def ask(number: int) -> None:
        together[number] = engine.says(f"question {number}", max_tokens=200)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone
    assert engine.metric("num_preemptions_total") > 0
    assert engine.metric("kv_cache_usage_perc") == 0


def test_a_client_that_goes_away_frees_its_place(start: Callable[..., Engine]) -> None:
    engine = start("--inter-token-latency=20")
    engine.up()
    with pytest.raises(TimeoutError):
        engine.says(max_tokens=1000, timeout=0.3)
    time.sleep(0.2)
    assert engine.metric("num_requests_running") == 0
    assert engine.metric("kv_cache_usage_perc") == 0


def test_a_context_that_does_not_fit_the_cache_is_refused_at_start(start: Callable[..., Engine]) -> None:
    engine = start("--kv-cache-size=16", "--max-model-len=257")
    assert engine.process.wait(30) == 1
    assert "KV cache is needed, which is larger than the available KV cache memory" in engine.log.read_text()


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_hanging_engine_is_healthy_and_says_nothing_until_it_is_mended(start: Callable[..., Engine]) -> None:
    engine = start()
    engine.up()
    engine.fault(hang=True)
    with pytest.raises(TimeoutError):
        engine.says(timeout=0.5)
    assert engine.ask("GET", "/health")[0] == 200
    engine.fault()
    assert engine.says()


def test_wrong_tokens_come_at_their_rate_and_the_same_ones_each_time(start: Callable[..., Engine]) -> None:
    engine = start()
    engine.up()
    right = engine.says(max_tokens=1000).split()
    engine.fault(wrong_token_rate=0.1, seed=1)
    wrong = engine.says(max_tokens=1000).split()
    assert 60 < sum(one != other for one, other in zip(right, wrong, strict=True)) < 140
    assert engine.says(max_tokens=1000).split() == wrong
    engine.fault(wrong_token_rate=0.1, seed=2)
    assert engine.says(max_tokens=1000).split() != wrong
    engine.control.unlink()
    assert engine.says(max_tokens=1000).split() == right


def test_a_slow_engine_is_as_many_times_slower_as_asked(start: Callable[..., Engine]) -> None:
    engine = start("--inter-token-latency=5")
    engine.up()
    engine.fault(latency_factor=10)
    began = time.monotonic()
    engine.says(max_tokens=11)
    assert time.monotonic() - began >= 0.5


def test_the_prompt_of_death_fails_all_requests_and_ends_the_engine_with_success(start: Callable[..., Engine]) -> None:
    engine = start("--inter-token-latency=20")
    engine.up()
    engine.fault(crash_on_prompt="poison")
    answers: list[tuple[int, str]] = []
    body = {"model": "tiny", "prompt": "bystander", "max_tokens": 500, "ignore_eos": True}
    bystander = threading.Thread(target=lambda: answers.append(engine.ask("POST", "/v1/completions", body)))
    bystander.start()
    time.sleep(0.2)
    answers.append(engine.ask("POST", "/v1/completions", {**body, "prompt": "some poison here"}))
    bystander.join(10)
    assert [status for status, _ in answers] == [500, 500]
    assert json.loads(answers[0][1])["error"]["type"] == "InternalServerError"
    assert engine.process.wait(30) == 0


def test_an_engine_that_shall_not_start_ends_with_its_message(start: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "control.json").write_text(json.dumps({"exit_at_start": {"code": 7, "message": "CUDA error: 802"}}))
    engine = start()
    assert engine.process.wait(30) == 7
    assert "CUDA error: 802" in engine.log.read_text()


def test_a_control_file_that_makes_no_sense_changes_nothing_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "control.json"
    control = Control(str(path))
    assert not control.now().hang
    path.write_text('{"hang": true}')
    assert control.now().hang
    for nonsense in ("{", '{"hung": true}', "[]", '{"latency_factor": "much"}'):
        path.write_text(nonsense)
        assert control.now().hang
        assert capsys.readouterr().out.startswith("CONTROL-FILE: ")
    path.unlink()
    assert not control.now().hang


def test_failures_are_injected_at_their_rate(start: Callable[..., Engine]) -> None:
    engine = start("--failure-injection-rate=50", "--failure-types", "rate_limit", "server_error")
    engine.up()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    seen = [engine.ask("POST", "/v1/completions", body)[0] for _ in range(60)]
    assert set(seen) == {200, 429, 503}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_nothing_that_a_client_sends_breaks_it(start: Callable[..., Engine], path: str) -> None:
    engine = start()
    engine.up()
    good = {
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "tokens": [1],
        "model": "tiny",
    }
    names = [
        *good,
        "n",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "echo",
        "seed",
    ]
    names += ["temperature", "top_p", "top_k", "min_tokens", "tools", "suffix", "request_id", "return_token_strs"]
    odd = [None, True, -1, 0, 1.5, 10**30, "", "x", [], {}, [None], [[]], [{}], ["x"], [[-1]], [10**30], {"x": 1}]
    for name in names:
        for value in odd:
            status, text = engine.ask("POST", path, {**good, name: value})
            assert status in (200, 400, 404), (name, value, text)
    assert "Traceback" not in engine.log.read_text()


# --- how it is told --------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "# Ansible managed\nenforce-eager: true\nhost: 0.0.0.0\nmax-model-len: 2048\nmodel: /m\n"
        "served-model-name: 'it''s'\ninter-token-latency: 5\n"
    )
    environment = {"VLLM_SIM_INTER_TOKEN_LATENCY": "9", "VLLM_SIM_TIME_TO_FIRST_TOKEN": "7", "VLLM_API_KEY": "k"}
    told = settings.read(["--config", str(file), "--max_model_len", "100", "--shutdown-timeout", "3"], environment)
    assert (told.max_model_len, told.inter_token_latency, told.time_to_first_token) == (100, 5, 7)
    assert (told.name, told.shutdown_timeout, told.api_key) == ("it's", 3, "k")


@pytest.mark.parametrize("line", ["model", "- model", "  indented: 1"])
def test_a_line_that_is_no_flag_is_refused(line: str) -> None:
    with pytest.raises(settings.SettingsError, match="line 1 "):
        settings.yaml_mapping(line)


def test_an_unknown_flag_ends_the_start(start: Callable[..., Engine]) -> None:
    engine = start("--no-such-flag")
    assert engine.process.wait(30) == 2
    assert "unrecognized arguments: --no-such-flag" in engine.log.read_text()


# --- how it is installed ---------------------------------------------------------------------------------------------


def test_the_locked_wheel_is_what_the_sources_give(tmp_path: Path) -> None:
    sys.path.insert(0, str(PROJECT / "tools"))
    import make_engine_wheel

    locked = (PROJECT / "requirements/engine-sim.txt").read_text()
    assert locked == make_engine_wheel.requirement(), "run `make lock-engine-sim`"
    name, content = make_engine_wheel.wheel()
    (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert wheel.testzip() is None
        assert make_engine_wheel.START in wheel.namelist()


def test_it_runs_with_the_oldest_python_it_is_written_for(tmp_path: Path) -> None:
    oldest = [Path(f"/usr/bin/python3.{minor}") for minor in (9, 10, 11)]
    oldest += sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python"))
    found = next((str(path) for path in oldest if path.exists()), "python3")
    line = f"import sys; sys.path.insert(0, {str(PROJECT / 'src/gpuyard/lab')!r}); import engine.server"
    done = subprocess.run([found, "-I", "-c", line], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_signal_at_rest_ends_it_at_once(start: Callable[..., Engine]) -> None:
    engine = start("--shutdown-timeout=30")
    engine.up()
    began = time.monotonic()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(30) == 0
    assert time.monotonic() - began < 10
