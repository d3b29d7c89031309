"""A bundle of evidence holds no secret, whatever it was found in."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.programs import program

SECRET = "k3yOfTheEnginesThatNobodyMayRead"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return program("node_health/files/collect_info.py")


@pytest.mark.parametrize(
    "text",
    [
        f"ps: /usr/bin/serve --api-key {SECRET} --port 8000",
        f"Authorization: Bearer {SECRET}",
        f"authorization: bearer   {SECRET}",
        f'"api_key": "{SECRET}"',
        f"API_KEYS={SECRET},other",
        f"VLLM_API_KEY={SECRET}",
        f"password: {SECRET}",
        f"acl known hdr(authorization) Bearer\\ {SECRET}",
        f"curl -H 'Authorization: Basic {SECRET}=='",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----",
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{SECRET}\n-----END PGP PRIVATE KEY BLOCK-----",
        f"HF: hf_{SECRET}",
    ],
)
def test_the_shapes_of_secrets_are_taken_out(script: ModuleType, text: str) -> None:
    assert SECRET not in script.redact(text, [])


def test_what_a_secret_file_holds_is_taken_out_wherever_it_stands(script: ModuleType) -> None:
    known = script.secrets([f"{SECRET}\n", "other: 'another-long-secret-word'\n"])
    text = script.redact(f"GET /?x={SECRET}&y=another-long-secret-word", known)
    assert text == "GET /?x=[removed]&y=[removed]"


def test_ordinary_words_stay(script: ModuleType) -> None:
    text = "max_num_batched_tokens: 2048\nprompt_tokens_total 17\nnvidia-driver-cuda 580.126.20-1\n"
    assert script.redact(text, script.secrets(["a b short"])) == text


def test_the_bundle_holds_the_files_asked_for_without_their_secrets_and_is_private(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "commands", lambda *_: {"journal/units.txt": ["echo", f"key is {SECRET}"]})
    (tmp_path / "engine.yaml").write_text(f"port: 8000\nkey here: {SECRET}\n")
    (tmp_path / "engine.key").write_text(SECRET)
    bundle = tmp_path / "bundle.tar.gz"
    wanted = {
        "units": [],
        "packages": [],
        "files": [f"{tmp_path}/engine.*"],
        "secret_files": [f"{tmp_path}/*.key"],
    }
    script.main([str(bundle), json.dumps(wanted)])
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    with tarfile.open(bundle) as tar:
        texts = {member.name: tar.extractfile(member).read().decode() for member in tar.getmembers()}  # type: ignore[union-attr]
    assert texts == {
        "journal/units.txt": "key is [removed]\n",
        f"files{tmp_path}/engine.yaml": "port: 8000\nkey here: [removed]\n",
        f"files{tmp_path}/engine.key": "[removed]\n",
    }


def test_a_tool_that_is_missing_is_evidence_too(script: ModuleType) -> None:
    assert script.ask(["/no/such/tool"]).startswith("no answer: ")
    assert script.ask(["sh", "-c", "echo x; exit 3"]) == "x\n\n(exit status 3)\n"
