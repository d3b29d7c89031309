"""Each role states its contract once, in two halves that do not overlap: meaning in the spec, values in defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
ROLES = sorted(folder for folder in (PROJECT / "roles").iterdir() if folder.is_dir())
NAMES = [role.name for role in ROLES]

by_role = pytest.mark.parametrize("role", ROLES, ids=NAMES)


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text()) if file.is_file() else None


def entry_points(role: Path) -> dict[str, dict[str, Any]]:
    return load(role / "meta/argument_specs.yml")["argument_specs"]


def options(role: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entry_points(role).values():
        found.update(entry.get("options") or {})
    return found


def defaults(role: Path) -> dict[str, Any]:
    return load(role / "defaults/main.yml") or {}


def every_option(spec: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, option in spec.items():
        yield name, option
        yield from every_option(option.get("options") or {})


def task_files(role: Path) -> list[Path]:
    return sorted([*(role / "tasks").glob("*.yml"), *(role / "handlers").glob("*.yml")])


def tasks(entries: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    for task in entries or []:
        yield task
        for inner in ("block", "rescue", "always"):
            yield from tasks(task.get(inner))


@by_role
def test_every_default_has_an_option(role: Path) -> None:
    assert sorted(set(defaults(role)) - set(options(role))) == []


@by_role
def test_every_optional_option_has_a_default(role: Path) -> None:
    optional = {name for name, option in options(role).items() if not option.get("required")}
    assert sorted(optional - set(defaults(role))) == []


@by_role
def test_no_required_option_has_a_default(role: Path) -> None:
    required = {name for name, option in options(role).items() if option.get("required")}
    assert sorted(required & set(defaults(role))) == []


@by_role
def test_no_option_repeats_a_value(role: Path) -> None:
    assert [name for name, option in every_option(options(role)) if "default" in option] == []


@by_role
def test_every_option_says_what_it_means_and_its_type(role: Path) -> None:
    bare = [name for name, option in every_option(options(role)) if not {"type", "description"} <= set(option)]
    assert bare == []


@by_role
def test_a_default_is_of_the_type_its_option_names(role: Path) -> None:
    kinds = {"str": str, "path": str, "int": int, "bool": bool, "list": list, "dict": dict, "float": float}
    wrong = [
        name
        for name, value in defaults(role).items()
        if type(value) is not kinds[options(role)[name]["type"]]
        # A template is a text here and becomes its type when it is used.
        and not (isinstance(value, str) and "{{" in value)
    ]
    assert wrong == []


@by_role
def test_public_names_carry_the_name_of_the_role(role: Path) -> None:
    strangers = [name for name in {**options(role), **defaults(role)} if not name.startswith(f"{role.name}_")]
    assert strangers == []


@by_role
def test_internal_names_carry_the_name_of_the_role(role: Path) -> None:
    internal: set[str] = set(load(role / "vars/main.yml") or {})
    for file in task_files(role):
        for task in tasks(load(file)):
            internal |= {task["register"]} if "register" in task else set()
            internal |= set(task.get("ansible.builtin.set_fact") or {}) - {"cacheable"}
    assert [name for name in internal if not name.startswith((f"__{role.name}_", f"{role.name}_"))] == []


@by_role
def test_every_verb_of_the_spec_has_its_tasks(role: Path) -> None:
    verbs = [verb for verb in entry_points(role) if not (role / "tasks" / f"{verb}.yml").is_file()]
    assert verbs == []


@by_role
def test_the_main_verb_is_a_list_of_verbs_that_can_be_run_alone(role: Path) -> None:
    for task in load(role / "tasks/main.yml") or []:
        verb = task["ansible.builtin.import_tasks"].removesuffix(".yml")
        assert task["tags"] in (["always"], [f"{role.name}_{verb}"]), task["name"]


@by_role
def test_every_task_has_a_name(role: Path) -> None:
    unnamed = [str(task)[:80] for file in task_files(role) for task in tasks(load(file)) if not task.get("name")]
    assert unnamed == []


@by_role
def test_every_refusal_begins_with_its_rule(role: Path) -> None:
    refusals = [task for file in task_files(role) for task in tasks(load(file)) if "ansible.builtin.assert" in task]
    rule = re.compile(r"[A-Z]+-([A-Z]+|\{\{.*?\}\})(-[A-Z]+)*: ")
    assert [task["name"] for task in refusals if not rule.match(task["ansible.builtin.assert"]["fail_msg"])] == []


@by_role
def test_the_role_has_a_readme_that_names_its_verbs(role: Path) -> None:
    text = (role / "README.md").read_text()
    assert text.startswith(f"# {role.name}\n")
    assert [verb for verb in entry_points(role) if verb != "main" and f"`{verb}`" not in text] == []


def words_of(role: Path) -> Iterator[tuple[Path, str]]:
    """What Ansible reads of a role. Programs that it carries to a node have words of their own."""
    for folder in ("tasks", "handlers", "defaults", "vars", "templates"):
        for file in sorted((role / folder).rglob("*")):
            if file.is_file():
                yield file, file.read_text()


@by_role
def test_no_role_knows_a_group(role: Path) -> None:
    found = [
        file.name for file, text in words_of(role) if re.search(r"\bgroup_names\b|(?<![\w.-])groups\s*[\[.|]", text)
    ]
    assert found == []


@by_role
def test_no_role_reads_a_variable_of_another(role: Path) -> None:
    others = "|".join(sorted((name for name in NAMES if name != role.name), key=len, reverse=True))
    # As a key it is an argument handed over with include_role; anywhere else it is read.
    pattern = re.compile(rf"(?<![\w./-])(?:__)?(?:{others})_\w+(?![\w:.-]|\.py)")
    found = [f"{file.name}: {match.group()}" for file, text in words_of(role) for match in pattern.finditer(text)]
    own = [name for name in found if not name.split(": ")[1].lstrip("_").startswith(f"{role.name}_")]
    assert own == []


@by_role
def test_no_role_reads_an_injected_fact(role: Path) -> None:
    facts = (
        r"\bansible_(distribution|os_family|kernel|architecture|hostname|fqdn|default_ipv4|all_ipv4|mem|processor)\w*"
    )
    found = [f"{file.name}: {match.group()}" for file, text in words_of(role) for match in re.finditer(facts, text)]
    assert found == []


@by_role
def test_the_role_is_rehearsed_with_a_fault_and_its_tests(role: Path) -> None:
    """Molecule passes over a playbook or a test that is not there, and is green."""
    scenario = PROJECT / "molecule" / role.name
    config = {
        **load(PROJECT / ".config/molecule/config.yml")["scenario"],
        **load(scenario / "molecule.yml").get("scenario", {}),
    }
    playbooks = load(scenario / "molecule.yml")["ansible"]["playbooks"]
    assert {"converge", "side_effect", "idempotence", "verify"} <= set(config["test_sequence"])
    assert set(playbooks) >= {"converge", "side_effect"}
    assert [name for name in playbooks.values() if not (scenario / name).is_file()] == []
    assert f"refused_role: {role.name}\n" in (scenario / "side_effect.yml").read_text()
    assert "def test_" in (scenario / f"tests/test_{role.name}.py").read_text()
