"""A model that is not what its manifest says is refused by name, with the rule that it breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins.module_utils import model_verify
from plugins.module_utils.model_verify import ModelError, parse_manifest, problems, read_manifest
from tests.serving.conftest import MODEL_FILES, PROJECT, write_model

DIGEST = "0" * 64


def rules(folder: Path) -> list[tuple[str, str]]:
    """(rule, message) of all that is wrong with a stored model."""
    return [(found.rule, str(found)) for found in problems(folder, read_manifest(folder))]


def test_a_whole_model_has_nothing_wrong(stored: Path) -> None:
    assert rules(stored) == []


def flip(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[1500] ^= 1
    shard.write_bytes(content)


BREAKS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "one bit is flipped": (flip, "MODEL-HASH", "model-00002-of-00002.safetensors"),
    "a shard is gone": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
        "MODEL-MISSING",
        "model-00001-of-00002.safetensors",
    ),
    "a pickle was added": (
        lambda folder: (folder / "pytorch_model.bin").touch(),
        "MODEL-PICKLE",
        "pytorch_model.bin",
    ),
    "a pickle in capitals was added": (lambda folder: (folder / "A.PKL").touch(), "MODEL-PICKLE", "A.PKL"),
    "code was added": (lambda folder: (folder / "modeling_x.py").touch(), "MODEL-REMOTE-CODE", "modeling_x.py"),
    "any file was added": (lambda folder: (folder / "notes.txt").touch(), "MODEL-EXTRA", "notes.txt"),
    "a hidden file was added": (lambda folder: (folder / "tokenizer/.x").touch(), "MODEL-EXTRA", ".x"),
    "a link to a folder was added": (lambda folder: (folder / "etc").symlink_to("/etc"), "MODEL-EXTRA", "etc"),
    "auto_map was added": (
        lambda folder: (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "x.Y"}})),
        "MODEL-REMOTE-CODE",
        "config.json",
    ),
}


@pytest.mark.parametrize(("breaking", "rule", "named"), BREAKS.values(), ids=BREAKS.keys())
def test_a_change_is_found_and_named(stored: Path, breaking: Callable[[Path], object], rule: str, named: str) -> None:
    breaking(stored)
    found = rules(stored)
    assert any(has == rule and named in message for has, message in found), found


def test_a_file_replaced_by_a_link_to_the_same_bytes_is_refused(stored: Path, tmp_path: Path) -> None:
    shard = stored / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert [rule for rule, _ in rules(stored)] == ["MODEL-SPECIAL"]


def test_every_finding_is_told_at_once(stored: Path) -> None:
    flip(stored)
    (stored / "config.json").unlink()
    assert {rule for rule, _ in rules(stored)} == {"MODEL-HASH", "MODEL-MISSING"}


def test_auto_map_is_found_however_deep_it_stands_and_whatever_the_manifest_says(tmp_path: Path) -> None:
    nested = json.dumps({"text_config": {"deeper": [{"auto_map": {}}]}})
    digest = write_model(tmp_path / "draft", {**MODEL_FILES, "config.json": nested})
    folder = (tmp_path / "draft").rename(tmp_path / digest[:12])
    assert [rule for rule, _ in rules(folder)] == ["MODEL-REMOTE-CODE"]


def test_a_shard_that_only_the_index_names_is_missing(tmp_path: Path) -> None:
    files = {name: text for name, text in MODEL_FILES.items() if name != "model-00002-of-00002.safetensors"}
    digest = write_model(tmp_path / "draft", files)
    folder = (tmp_path / "draft").rename(tmp_path / digest[:12])
    ((rule, message),) = rules(folder)
    assert rule == "MODEL-MISSING"
    assert "model-00002-of-00002.safetensors" in message


def test_a_configuration_nested_too_deep_to_read_is_refused(tmp_path: Path) -> None:
    digest = write_model(tmp_path / "draft", {**MODEL_FILES, "config.json": "[" * 200_000})
    folder = (tmp_path / "draft").rename(tmp_path / digest[:12])
    assert [rule for rule, _ in rules(folder)] == ["MODEL-CONFIG"]


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a//b", "./x", "a\\b", "MANIFEST.sha256", "a\x1bb", "a/"]
)
def test_a_path_that_leaves_the_directory_is_refused(path: str) -> None:
    with pytest.raises(ModelError) as refused:
        parse_manifest(f"{DIGEST}  {path}\n")
    assert refused.value.rule == "MODEL-PATH"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no manifest\n",
        f"{DIGEST[:-1]}  a\n",
        f"{DIGEST} a\n",
        f"{DIGEST.replace('0', 'G')}  a\n",
        f"{DIGEST}  a\n" * 2,
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ModelError) as refused:
        parse_manifest(text)
    assert refused.value.rule == "MODEL-MANIFEST"


@pytest.mark.parametrize("name", ["model.bin", "a/b.pt", "x.ckpt", "x.pth", "x.pickle", "x.joblib"])
def test_a_manifest_that_asks_for_a_pickle_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as refused:
        parse_manifest(f"{DIGEST}  {name}\n")
    assert refused.value.rule == "MODEL-PICKLE"


def test_another_manifest_than_the_one_the_directory_is_named_after_is_refused(stored: Path) -> None:
    (stored / "notes.txt").touch()
    (stored / "MANIFEST.sha256").write_text(f"{(stored / 'MANIFEST.sha256').read_text()}{DIGEST}  notes.txt\n")
    with pytest.raises(ModelError) as refused:
        read_manifest(stored)
    assert refused.value.rule == "MODEL-HASH"


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    """The program that a unit runs."""
    return subprocess.run(
        [sys.executable, str(PROJECT / "plugins/module_utils/model_verify.py"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_program_passes_a_whole_model_and_says_how_many_files_it_read(stored: Path) -> None:
    done = verify(stored)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 files" in done.stdout


def test_the_program_ends_with_1_and_names_the_file_and_the_way_out(stored: Path) -> None:
    flip(stored)
    done = verify(stored)
    assert done.returncode == 1
    assert "MODEL-HASH" in done.stderr
    assert str(stored / "model-00002-of-00002.safetensors") in done.stderr
    assert "model_store_full_check=true" in done.stderr


def test_the_program_runs_with_the_oldest_python_of_a_node() -> None:
    """No name of a later standard library and no later syntax, as far as a compiler can tell."""
    import ast

    for name in (*sorted(path.stem for path in (PROJECT / "plugins/module_utils").glob("model_*.py")), "engine_inputs"):
        source = (PROJECT / f"plugins/module_utils/{name}.py").read_text()
        ast.parse(source, feature_version=(3, 9))
    assert model_verify.DIGITS == 12
