"""Makes the spec's reference page out of the spec itself, each time the site is built."""

from __future__ import annotations

from mkdocs.structure.files import File, Files

from xtoken_core.spec.fields import SpecField, spec_fields

HEAD = """# The spec

Every option, its values and its default. `xtoken explain FIELD` prints the same, and `xtoken schema` writes a JSON schema for editors.
Unknown keys, contradictions and bad values are errors that name the field; nothing is ignored.

"""


def on_files(files: Files, config) -> Files:  # type: ignore[no-untyped-def]
    """Adds spec.md."""
    files.append(File.generated(config, "spec.md", content=HEAD + "\n".join(_lines(spec_fields()))))
    return files


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
