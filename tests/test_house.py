"""The house: which room may import which, and how long files, functions and signatures may be."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("xtoken_core", "components", "pipelines")

FLOORS = (
    ("pipelines",),
    ("components",),
    ("workflow",),
    ("training", "report"),
    ("teachers", "evaluation"),
    ("models", "layers", "configs"),
    ("losses", "data"),
    ("projection", "projection_files", "overlap", "alignment", "partition", "first_tokens", "same_vocabulary"),
    ("tokenization", "tokenizer_parts", "tokenizer_checks", "token_hashes", "modes", "spec", "results", "costs"),
    ("checksums",),
    (
        "storage",
        "uris",
        "errors",
        "forking",
        "preloading",
        "compilations",
        "finite",
        "processes",
        "progress",
        "identity",
        "bounded",
    ),
)
"""Packages, and rooms of xtoken_core, from the top down: one imports its own floor and those below."""

INITS_WITH_IMPORTS = {f"xtoken_core/{name}__init__.py" for name in ("", "losses/", "losses/kernels/", "spec/", "storage/")}
"""Of packages that are called by their own name; the whole names its public calls and imports them when they are asked for."""

HEAVY_WINGS = {
    "pipelines/api.py",
    "pipelines/commands/cluster.py",
    "pipelines/commands/runs.py",
    "pipelines/commands/specs.py",
    "pipelines/commands/sweeps.py",
    "pipelines/commands/students.py",
    "pipelines/demo_models.py",
    "xtoken_core/evaluation/evaluate.py",
    "xtoken_core/evaluation/harness.py",
    "xtoken_core/losses/dispatch.py",
    "xtoken_core/workflow/resolve.py",
}
"""Files that import our own modules inside a function, since loading them would cost seconds that most callers do not need."""

# What broke a rule when this test was written, and a few that stand: reference.py, public calls, command lines.
LONG_FILES = {"xtoken_core/losses/reference.py"}
LONG_FUNCTIONS = {
    "components/report.py: report",
    "xtoken_core/losses/reference.py: distillation_loss",
}
MANY_PARAMETERS = {
    "pipelines/commands/cluster.py: submit",  # an option each
    "pipelines/commands/sweeps.py: sweep",
    "xtoken_core/evaluation/bits_per_byte.py: token_nats",
    "xtoken_core/losses/aggregation.py: distillation_loss",  # a public call
    "xtoken_core/workflow/evaluations.py: evaluate_group",
}


def sources(*folders: str) -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text() for f in folders for p in sorted((ROOT / f).rglob("*.py"))}


OURS = {path: ast.parse(text) for path, text in sources(*PACKAGES).items()}


def module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(path): path for path in OURS}


def imported(tree: ast.AST) -> set[str]:
    """Modules of ours that a tree imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & MODULES.keys()) or {str(node.module)}
    return names & MODULES.keys()


def floor(name: str) -> int:
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0] if package == "xtoken_core" else package
    found = next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)
    assert found is not None, f"{room}: give it a floor in tests/test_house.py"
    return found


def functions(tree: ast.AST, *besides: str) -> list[ast.FunctionDef]:
    """All of a tree, methods and inner ones too; `besides`: without those under such a decorator."""

    def decorators(function: ast.FunctionDef) -> set[str]:
        return {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}

    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not decorators(node) & set(besides)]


def offenders(broken: set[str], known: set[str]) -> None:
    """Nothing but what is known to break a rule does, and what is mended is taken off the list."""
    assert sorted(broken - known) == [], "breaks a rule of docs/developers/house.md"
    assert sorted(known - broken) == [], "is mended: take it off the list in tests/test_house.py"


@pytest.mark.parametrize("path", OURS)
def test_arrows_run_down(path):
    name = module(path)
    if name != "xtoken_core":  # which names the public calls
        upwards = {other for other in imported(OURS[path]) - {"xtoken_core"} if floor(other) < floor(name)}
        assert not upwards


def test_no_circles():
    graph = {module(path): imported(tree) - {module(path)} for path, tree in OURS.items()}
    graphlib.TopologicalSorter({name: others - {"xtoken_core"} for name, others in graph.items()}).prepare()


def test_imports_of_ours_stand_at_the_top():
    inner = {path for path, tree in OURS.items() if any(imported(function) for function in functions(tree))}
    offenders({path for path in inner if not path.startswith("components/")}, HEAVY_WINGS)


def test_packages_import_nothing():
    assert {path for path, tree in OURS.items() if path.endswith("__init__.py") and imported(tree)} <= INITS_WITH_IMPORTS


def test_lengths():
    offenders({path for path, text in sources(*PACKAGES).items() if len(text.splitlines()) > 300}, LONG_FILES)
    lengths = {
        f"{path}: {f.name}": f.end_lineno - f.lineno + 1 for path, tree in OURS.items() for f in functions(tree, "triton.jit")
    }
    offenders({name for name, length in lengths.items() if length > 60}, LONG_FUNCTIONS)


def test_parameters():
    broken = set()
    for path, tree in OURS.items():
        for f in functions(tree, "triton.jit", "component"):
            given = [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if len(given) > 6:
                broken.add(f"{path}: {f.name}")
    offenders(broken, MANY_PARAMETERS)


def test_no_banners():
    texts = sources(*PACKAGES, "tests")
    assert [path for path, text in texts.items() if re.search(r"^ *# ?[-=]{10}", text, re.MULTILINE)] == []


def test_no_links_are_kept():
    """A link, say to a folder of models, leads nowhere in another's clone."""
    kept = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in kept.splitlines() if line.startswith("120000")] == []
