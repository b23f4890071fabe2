"""The documentation: it builds without a warning, its specs are valid, its snippets run, it names every field of the spec."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.__main__ import cli
from tests.benchmarks import recipes
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.fields import spec_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_specs_on_a_page_are_valid(page):
    specs = [block for block in blocks(page, "yaml") if "student:" in block]
    for block in specs:
        DistillationSpec.from_text(block, source=page.name)
    assert specs or page.stem not in ("index", "README", "chats", "gpus")


def test_the_loss_snippet_runs():
    (snippet,) = blocks(ROOT / "docs" / "developers" / "losses.md", "python")
    names: dict = {}
    exec(snippet, names)
    assert names["student_logits"].grad.abs().sum() > 0


def test_the_site_builds_and_names_every_field(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    reference = (tmp_path / "spec" / "index.html").read_text(encoding="utf-8")
    assert [
        f.path
        for f in spec_fields(DistillationSpec)
        if f"<code>{f.path.rpartition('.')[2]}</code>" not in reference and not f.section
    ] == []


def test_commands_that_pages_name_exist():
    named = {word for page in PAGES for word in re.findall(r"(?:^|`)xtoken ([a-z]+)", page.read_text(encoding="utf-8"), re.M)}
    assert named >= {"validate", "run", "submit"} and named <= set(cli.commands)


def test_options_that_pages_name_are_those_of_the_command():
    """In `xtoken plan SPEC --from RUN` and the like; a page that tells of an option that has gone is a lie."""
    known = {name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for name, command in cli.commands.items()}
    used = [
        (page.stem, name, option)
        for page in PAGES
        for name, words in re.findall(r"xtoken ([a-z]+)([^\n`|#;)]*)", page.read_text(encoding="utf-8"))
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", words)
    ]
    assert len(used) > 12 and [use for use in used if use[2] not in known[use[1]]] == []


def test_fields_and_files_that_pages_name_exist():
    fields = {field.path.replace("[]", "") for field in spec_fields(DistillationSpec)}
    sections = "|".join(sorted({path.partition(".")[0] for path in fields}))
    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        told = [name.replace("[]", "") for name in re.findall(rf"`((?:{sections})(?:\[\])?\.[a-z_.\[\]]+)[`:={{ ]", text)]
        assert [name for name in told if name not in fields and not name.endswith((".yaml", ".json"))] == [], page
        files = re.findall(r"`((?:tests|pipelines|manifests|xtoken_core|components|examples)/[\w./-]+)`", text)
        assert [file for file in files if not (ROOT / file).exists()] == [], page
        found += len(told) + len(files)
    assert found > 60


def test_every_field_has_its_values_and_a_default():
    found = {field.path: field for field in spec_fields(DistillationSpec)}
    assert found["loss.mode"].kind.startswith("partition_kl | ") and found["loss.temperature"].default == "1.0"
    assert found["teachers[].projection.top_k"].kind == "integer, above 0, at most 64"
    assert found["student.model"].default == "required" and found["training"].section
    assert found["resources.labels"].default == "{}"


def test_pages_in_the_menu_are_those_that_exist():
    named = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} | {"spec.md"}
    assert named == there


ASKS = re.compile(r"; (add|choose|clone|compile|give|merge|move|name|remove|set|use|where)\b|pip install|carries a user name")
"""What a line of bad input says where there is something to do."""


def texts(node: ast.AST) -> str:
    """What stands in a string literal, `{}` for what it fills in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "{}" for part in parts)


def test_troubleshooting_has_every_line_that_asks_for_an_action_and_no_line_that_is_not_said():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    named = {quoted for row in re.findall(r"^\| (.*?) \|", page, re.M) for quoted in re.findall("`([^`]+)`", row)}
    files = [path for folder in ("xtoken_core", "components", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    raised = [n.args[0] for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "").endswith("Error") and n.args]
    asking = [message for message in map(texts, raised) if ASKS.search(message)]
    assert len(asking) > 15
    assert [message for message in asking if not any(quoted in message for quoted in named if len(quoted) >= 8)] == []
    said = "\n".join(texts(node) for node in nodes if isinstance(node, (ast.JoinedStr, ast.Constant)))
    assert [part for quoted in named for part in re.split(r" ?\.\.\. ?| N |\bX\b|, K ", quoted) if part.strip() not in said] == []


def test_the_costs_of_recipes_are_what_a_plan_tells():
    """`python -m tests.benchmarks.recipes` prints the table as it has to be."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipes.table() in page
    named = set(re.findall(r"`([\w-]+\.yaml)`", page))
    assert named >= {path.name for path in recipes.SPECS.glob("llama-*.yaml")}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= 130
