"""Steps run when what they need is done, and a failure says what to do."""

import os
import threading
import time
from pathlib import Path

import pytest
from steps.stepper import (
    DONE,
    FAILED,
    NOT_RUN,
    OK,
    NeedsRootError,
    SetupError,
    Step,
    Stepper,
    Work,
    in_order,
    table,
)


def missing() -> None:
    return None


def step(name, make=lambda _: "made", ready=missing, needs=(), **more):
    return Step(name, ready, make, tuple(needs), **more)


def stepper(tmp_path, *steps, every=30.0):
    said: list[str] = []
    return Stepper({one.name: one for one in steps}, tmp_path, say=said.append, every=every), said


def test_a_step_comes_after_all_it_needs():
    steps = {one.name: one for one in (step("c", needs=["b", "a"]), step("b", needs=["a"]), step("a"))}
    assert in_order(steps, ["c"]) == ["a", "b", "c"]


def test_steps_that_need_each_other_are_named():
    steps = {one.name: one for one in (step("a", needs=["b"]), step("b", needs=["a"]))}
    with pytest.raises(ValueError, match="a → b → a"):
        in_order(steps, ["a"])


def test_an_unknown_step_is_refused_with_those_there_are():
    with pytest.raises(SetupError, match="SETUP-STEP: there is no step 'z'; there are a"):
        in_order({"a": step("a")}, ["z"])


def test_what_stands_is_left_alone(tmp_path):
    def make(work):
        raise AssertionError("made again")

    runner, said = stepper(tmp_path, step("a", make, ready=lambda: "there"))
    results = runner.run(["a"])
    assert (results["a"].outcome, results["a"].detail, said) == (OK, "there", [])


def test_steps_that_do_not_need_each_other_run_side_by_side(tmp_path):
    meeting = threading.Barrier(2, timeout=20)

    def make(work):
        meeting.wait()
        return "met"

    runner, _ = stepper(tmp_path, step("a", make), step("b", make))
    assert {result.detail for result in runner.run(["a", "b"]).values()} == {"met"}


def test_a_failure_stops_those_who_need_it_and_nobody_else(tmp_path):
    def fail(work):
        raise SetupError("SETUP-X", "found this; do that")

    steps = [step("a", fail), step("b", needs=["a"]), step("c", needs=["b"]), step("d")]
    runner, said = stepper(tmp_path, *steps)
    results = runner.run(["c", "d"])
    assert {name: result.outcome for name, result in results.items()} == {
        "a": FAILED,
        "b": NOT_RUN,
        "c": NOT_RUN,
        "d": DONE,
    }
    assert "SETUP-X: found this; do that" in "\n".join(said)
    assert "needs b" in table(results)


def test_what_only_root_may_do_is_not_run_rather_than_failed(tmp_path):
    def refuse(work):
        raise NeedsRootError("SETUP-ROOT", "needs root; run: sudo …")

    runner, _ = stepper(tmp_path, step("a", refuse))
    assert runner.run(["a"])["a"].outcome == NOT_RUN


def test_a_file_that_cannot_be_written_is_a_refusal_and_no_traceback(tmp_path):
    def fail(work):
        (tmp_path / "missing/file").write_text("")

    runner, said = stepper(tmp_path, step("a", fail))
    assert runner.run(["a"])["a"].outcome == FAILED
    assert "SETUP-FILES" in "\n".join(said)


def test_what_takes_long_is_spoken_of(tmp_path):
    def wait_for_the_word(work):
        deadline = time.monotonic() + 20
        while not any("a 0:0" in line for line in said) and time.monotonic() < deadline:
            time.sleep(0.01)
        return "made"

    runner, said = stepper(tmp_path, step("a", wait_for_the_word), every=0.05)
    assert runner.run(["a"])["a"].seconds < 20


def run(tmp_path, command, seconds=60, source="a Python package index"):
    made = step("a", lambda work: str(work.run(command)), seconds=seconds, source=source)
    runner, said = stepper(tmp_path, made)
    return runner.run(["a"])["a"], "\n".join(said)


def test_a_command_that_fails_shows_the_end_of_its_output_and_where_all_of_it_is(tmp_path):
    result, said = run(tmp_path, ["sh", "-c", "echo so it was; exit 3"])
    assert result.outcome == FAILED
    assert "SETUP-COMMAND" in said
    assert "ended with 3" in said
    assert "| so it was" in said
    assert str(tmp_path / "a.log") in said


def test_without_network_the_message_names_what_is_missing_and_what_it_comes_from(tmp_path):
    _, said = run(tmp_path, ["sh", "-c", "echo 'Could not resolve host: example.org'; exit 1"])
    assert "SETUP-NETWORK: a is missing and comes from a Python package index, which did not answer" in said


def test_a_certificate_nobody_vouches_for_is_told_apart_from_no_network(tmp_path):
    _, said = run(
        tmp_path, ["sh", "-c", "echo 'error sending request: invalid peer certificate: UnknownIssuer'; exit 1"]
    )
    assert "SETUP-TRUST" in said
    assert "update-ca-certificates" in said


def test_a_program_that_is_not_there_is_named(tmp_path):
    _, said = run(tmp_path, [tmp_path / "nothing"])
    assert f"SETUP-COMMAND: {tmp_path / 'nothing'} cannot be run" in said


def test_a_step_whose_time_is_over_is_ended_with_all_it_started(tmp_path):
    child = tmp_path / "child"
    _, said = run(tmp_path, ["sh", "-c", f"sleep 1000 & echo $! > {child}; wait"], seconds=1)
    assert "SETUP-DEADLINE" in said
    deadline = time.monotonic() + 20
    while alive(int(child.read_text())):
        assert time.monotonic() < deadline, "what the command started goes on"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def test_a_command_holds_the_lock_for_as_long_as_it_lives(tmp_path):
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    work = Work(step("a"), tmp_path / "a.log", time.monotonic() + 20, (descriptor,))
    work.run(["sh", "-c", f"readlink /proc/self/fd/{descriptor}"])
    os.close(descriptor)
    assert f"{tmp_path}/lock" in (tmp_path / "a.log").read_text().splitlines()
