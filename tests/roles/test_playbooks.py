"""Playbooks read aloud as sentences, and Ansible can parse them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
PLAYBOOKS = sorted(file for file in (PROJECT / "playbooks").rglob("*.yml") if "tasks" not in file.parts)

by_playbook = pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda file: file.stem)


def test_there_are_playbooks() -> None:
    assert {"site", "verify", "collect_info"} <= {playbook.stem for playbook in PLAYBOOKS}


@by_playbook
def test_a_playbook_begins_with_what_it_does_and_how_it_is_run(playbook: Path) -> None:
    header = list(itertools.takewhile(lambda line: line.startswith("#"), playbook.read_text().splitlines()))
    assert len(header) >= 2, "no header comment"
    assert any(
        f"ansible-playbook -i inventories/lab playbooks/{playbook.relative_to(PROJECT / 'playbooks')}" in line
        for line in header
    )


@by_playbook
def test_every_play_and_every_task_is_a_sentence(playbook: Path) -> None:
    for play in yaml.safe_load(playbook.read_text()):
        assert play["name"][0].isupper(), play
        for part in ("pre_tasks", "tasks", "post_tasks"):
            assert all(task["name"][0].isupper() for task in play.get(part, [])), play["name"]


@by_playbook
def test_a_play_that_touches_nodes_says_that_it_becomes_root(playbook: Path) -> None:
    for play in yaml.safe_load(playbook.read_text()):
        if "roles" in play:
            assert play.get("become") is True, play["name"]


@by_playbook
def test_ansible_can_parse_it(playbook: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "--syntax-check", "--inventory", "localhost,", playbook],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
