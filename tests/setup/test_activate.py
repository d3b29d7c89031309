"""One line gives a shell the project's tools, from wherever it is asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shell", [name for name in ("bash", "zsh") if shutil.which(name)])
def test_the_environment_is_the_projects_from_any_folder(shell, tmp_path):
    # Twice, and with a strict shell: what an impatient user and a careful script do.
    script = f". '{PROJECT}/activate'; . '{PROJECT}/activate'; env -0"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([shell, "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    got = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    ours = [f"{PROJECT}/.venv/bin", f"{PROJECT}/.gpuyard/bin"]
    assert got["PATH"].split(":")[:2] == ours
    assert got["PATH"].split(":").count(ours[1]) == env["PATH"].split(":").count(ours[1]) + (
        0 if env["PATH"].startswith(":".join(ours)) else 1
    )
    assert got["GPUYARD_PROJECT"] == str(PROJECT)
    assert got["GPUYARD_CACHE"] == f"{tmp_path}/.cache/gpuyard"
    assert got["PULUMI_BACKEND_URL"] == f"file://{PROJECT}/.gpuyard/pulumi?metadata=skip"
    assert got["PULUMI_CONFIG_PASSPHRASE_FILE"] == f"{PROJECT}/.gpuyard/passphrase"
    assert got["PULUMI_SKIP_UPDATE_CHECK"] == "true"
    assert got["ANSIBLE_CONFIG"] == f"{PROJECT}/ansible.cfg"


@pytest.mark.parametrize(
    ("chosen", "name", "value"),
    [
        ("GPUYARD_CACHE", "GPUYARD_CACHE", "/elsewhere"),
        ("GPUYARD_BACKEND_URL", "PULUMI_BACKEND_URL", "s3://my-fleets-state?region=us-east-1"),
    ],
)
def test_what_the_user_chose_is_kept(tmp_path, chosen, name, value):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), chosen: value}
    script = f". '{PROJECT}/activate'; echo ${name}"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == value


def test_every_target_of_the_makefile_says_what_it_does():
    makefile = (PROJECT / "Makefile").read_text()
    phony = [line.split()[1] for line in makefile.splitlines() if line.startswith(".PHONY: ")]
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[1] for line in listed.splitlines()] == phony
