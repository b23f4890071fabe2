"""Makes the spec's reference out of the spec itself, and draws the workflow as the report does, each time the site is built."""

from __future__ import annotations

from pathlib import Path

import yaml
from mkdocs.structure.files import File, Files

from xtoken_core.report.dag import BOX_HEIGHT, BOX_WIDTH, dag_picture
from xtoken_core.results.workflow import Task
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.fields import SpecField, spec_fields

HEAD = """# The spec

Every option, its values and its default. `xtoken explain FIELD` prints the same, and `xtoken schema` writes a JSON schema for editors.
Unknown keys, contradictions and bad values are errors that name the field; nothing is ignored.

"""


def on_files(files: Files, config) -> Files:  # type: ignore[no-untyped-def]
    """Adds spec.md."""
    files.append(File.generated(config, "spec.md", content=HEAD + "\n".join(_lines(spec_fields(DistillationSpec)))))
    return files


COMPILED = Path(__file__).parents[1] / "pipelines" / "compiled" / "demo.yaml"
"""A run with a twin, whose steps the picture shows."""

_BOX = '<rect width="{w}" height="{h}" rx="7" fill="none" stroke="currentColor"/>'
_TEXT = '<text x="{x}" y="{y}" text-anchor="middle" font-size="13" fill="currentColor">{text}</text>'


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts the picture where a page asks for it."""
    return markdown.replace("{{ workflow }}", _picture())


def _picture() -> str:
    compiled = next(yaml.safe_load_all(COMPILED.read_text(encoding="utf-8")))["root"]["dag"]["tasks"]
    dag = dag_picture([Task(name=name, after=task.get("dependentTasks", [])) for name, task in compiled.items()])
    assert dag is not None
    parts = [f'<path d="{edge}" fill="none" stroke="currentColor" opacity=".5"/>' for edge in dag.edges]
    for box in dag.boxes:
        text = _TEXT.format(x=BOX_WIDTH / 2, y=BOX_HEIGHT / 2 + 5, text=box.name)
        parts.append(f'<g transform="translate({box.x} {box.y})">{_BOX.format(w=BOX_WIDTH, h=BOX_HEIGHT)}{text}</g>')
    view = f"-2 -2 {dag.width + 4} {dag.height + 4}"
    return f'<svg viewBox="{view}" role="img" aria-label="The steps of a run and what each waits for">{"".join(parts)}</svg>'


def _lines(fields: list[SpecField]) -> list[str]:
    """A table for each section, sections inside another one behind it."""
    about = {field.path: field.description for field in fields if field.section}
    sections: dict[str, list[SpecField]] = {"": [], **{path: [] for path in about}}
    for field in fields:
        if not field.section:
            sections[field.path.rpartition(".")[0]].append(field)
    lines = []
    for path, inside in sections.items():
        lines += ["", f"## {path or 'The whole'}", "", _sentence(about.get(path, "")), ""]
        lines += ["| field | values | default | what it is |", "|---|---|---|---|", *map(_row, inside)] if inside else []
    return lines


def _row(field: SpecField) -> str:
    example = f"; e.g. `{field.examples[0]}`" if field.examples else ""
    name = field.path.rpartition(".")[2]
    return f"| `{name}` | {_cell(field.kind)} | `{field.default}` | {_cell(field.description)}{example} |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
