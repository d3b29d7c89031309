"""Rules of the house that are tests, not sentences in a guide."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpuyard.cli import MODULES, commands_of

PROJECT = Path(__file__).parents[2]
RUNGS = ["model", "mocks", "engine + emulated cloud", "lab", "QEMU", "hardware", "unproven"]

# Joined here, so that this file does not hold what it forbids.
REGISTRY_HOSTS = [
    ".".join(words)
    for words in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("proxy", "golang", "org"),
        ("sum", "golang", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("archive", "ubuntu", "com"),
    )
]
MACHINE_PATHS = [
    "/" + "/".join(words)
    for words in (("work", "main"), ("work", "shared"), ("work", ".library"), ("tmp", "w", ""), ("root", ".cache"))
]


def committed() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    paths = [PROJECT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def test_every_file_with_a_test_is_collected() -> None:
    lost = [
        name_of(path)
        for folder in ("tests", "molecule")
        for path in (PROJECT / folder).rglob("*.py")
        if re.search(r"^(async )?def test_|^class Test", path.read_text(), re.MULTILINE)
        and not path.name.startswith("test_")
    ]
    assert lost == []


def test_links_are_links() -> None:
    """A copy that does not know links leaves a file with the target's name in it, and Ansible finds no collection."""
    flat = [
        name_of(path)
        for path in committed()
        if path.stat().st_size < 200 and re.fullmatch(r"(\.\./)*\.\.(/[\w./-]+)?", text_of(path))
    ]
    assert flat == []


def test_every_test_file_holds_a_test() -> None:
    empty = [
        name_of(path)
        for path in (PROJECT / "tests").rglob("test_*.py")
        if not re.search(r"^\s*(async )?def test_", path.read_text(), re.MULTILINE)
    ]
    assert empty == []


def test_rooms_look_back_never_forward() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_committed_file_names_a_package_registry() -> None:
    found = [
        f"{name_of(path)}: {host}" for path in committed() for host in REGISTRY_HOSTS if host in text_of(path).lower()
    ]
    assert found == []


def test_requirements_ask_the_registry_that_the_user_has_configured() -> None:
    files = list((PROJECT / "requirements").glob("*.txt"))
    assert files
    for path in files:
        options = [line for line in path.read_text().splitlines() if line.startswith("-")]
        assert options == [], path.name


def test_every_locked_package_is_pinned_and_hashed() -> None:
    for path in (PROJECT / "requirements").glob("*.txt"):
        blocks = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
        for block in filter(None, map(str.strip, blocks)):
            assert re.match(r"[A-Za-z0-9._\[\],-]+==[^\s;]+", block), f"{path.name}: {block.splitlines()[0]}"
            assert "--hash=sha256:" in block, f"{path.name}: {block.splitlines()[0]}"


def test_no_committed_file_knows_the_machine_it_was_written_on() -> None:
    found = [f"{name_of(path)}: {part}" for path in committed() for part in MACHINE_PATHS if part in text_of(path)]
    assert found == []


def capabilities() -> list[list[str]]:
    lines = (PROJECT / "README.md").read_text().splitlines()
    start = lines.index("| Capability | Highest rung proven | Proof |")
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows


def test_the_readme_says_for_each_capability_how_far_it_is_proven() -> None:
    rows = capabilities()
    assert len(rows) >= 5
    for row in rows:
        assert len(row) == 3, row
        assert row[1] in RUNGS, row


@pytest.mark.parametrize("row", capabilities(), ids=lambda row: row[0])
def test_each_claim_names_the_tests_that_carry_it(row: list[str]) -> None:
    capability, rung, proof = row
    named = re.findall(r"`([^`]+)`", proof)
    if rung == "unproven":
        assert named == [], f"{capability} has a proof: name the rung it proves"
        return
    assert named, f"{capability} claims the rung {rung} without a proof"
    tracked = {name_of(path) for path in committed()}
    for name in named:
        assert name in tracked, f"{name} is not committed"
        text = (PROJECT / name).read_text()
        assert re.search(r"^\s*(async )?def test_", text, re.MULTILINE), f"{name} holds no test"
        marked = set(re.findall(r"pytest\.mark\.(lab|engine|contract|qemu|hardware)\b", text))
        if name.startswith("molecule/"):
            marked.add("lab")
        needed = {
            "lab": {"lab", "contract"},  # the contract's engines run inside the lab's base system
            "QEMU": {"qemu"},
            "hardware": {"hardware"},
            "engine + emulated cloud": {"engine"},
        }.get(rung)
        assert needed is None or needed & marked, f"{name} does not run on the rung {rung}"


def test_changelog_fragments_are_well_formed() -> None:
    fragments = [path for path in (PROJECT / "changelog.d").iterdir() if path.name != ".gitkeep"]
    for path in fragments:
        assert re.fullmatch(r"[0-9]+(-[a-z]+)?\.(added|changed|fixed|removed)\.md", path.name), path.name
        text = path.read_text()
        assert text.endswith("\n") and text.strip(), path.name
        assert text.strip().endswith("."), f"{path.name}: a sentence or two for users"
        assert not text.startswith("#"), f"{path.name}: the release gives it its heading"


def test_every_symbolic_link_stays_inside_the_project() -> None:
    listing = subprocess.run(["git", "ls-files", "-s"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    links = [line.split("\t")[1] for line in listing.splitlines() if line.startswith("120000")]
    for link in links:
        assert (PROJECT / link).resolve().is_relative_to(PROJECT), link


def test_generated_state_is_never_committed() -> None:
    found = [name_of(path) for path in committed() if re.search(r"(^|/)(\.gpuyard|\.venv|__pycache__)/", name_of(path))]
    assert found == []


def test_each_module_of_the_command_line_adds_the_commands_that_it_is_listed_with() -> None:
    """Who asks for one command has its module alone imported, so the list is what there is."""
    for module, names in MODULES.items():
        assert tuple(commands_of(module)) == names, module
    told = subprocess.run(["gpuyard", "plna"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "No such command 'plna'. Did you mean 'plan'?" in told.stderr
