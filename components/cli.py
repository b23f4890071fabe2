"""One definition, two ways in: a function becomes a KFP component, and a command line made from the same signature.

KFP runs a component's source by itself, in the image of the step: bodies import what they need, use nothing else of their
module, and the annotations are real objects (no `from __future__ import annotations` in a component's file).
"""

import errno
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

import click
from docstring_parser import parse
from kfp import dsl
from kfp.dsl.types import type_annotations

from xtoken_core import storage
from xtoken_core.errors import InputError, full_disk
from xtoken_core.spec import ResourcesSpec
from xtoken_core.workflow.views import View

component = partial(dsl.component, base_image=ResourcesSpec().image, install_kfp_package=False)
"""The decorator of every component; a pipeline puts its spec's image in place of the default one."""


PATH_ERRORS = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
}  # fmt: skip
"""What is wrong with a place that the user has named, as against with this program."""


def command(component: Any) -> click.Command:
    """The command line of a component: an option per input and output, texts from its docstring.

    `spec` takes a YAML or JSON file (with `--set`), other values are plain or JSON, artifacts are paths or URIs.
    Values that the component returns are printed as JSON.
    """
    function = component.python_func
    doc = parse(inspect.getdoc(function) or "")
    texts = {param.arg_name: " ".join((param.description or "").split()) for param in doc.params}
    parameters = inspect.signature(function).parameters.values()
    options: list[click.Parameter] = []
    for parameter in parameters:
        options.append(_option(parameter, texts[parameter.name]))
        if parameter.name == "spec":
            options.append(click.Option(["--set", "changes"], multiple=True, metavar="KEY=VALUE", help="Change the spec."))
    about = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    run = partial(_run, function, {p.name: p.annotation for p in parameters})
    name = f"python -m {Path(inspect.getfile(function)).parent.name}.{function.__name__}"
    return click.Command(name, params=options, callback=run, help=about)


def main(component: Any) -> None:
    """Runs a component's command line under the name that its users type."""
    cli = command(component)
    run_command(cli, cli.name or "")


def run_command(cli: click.Command, name: str) -> None:
    """Runs a command line; what is wrong with its input is one line on stderr and exit code 2."""
    try:
        cli.main(prog_name=name, standalone_mode=False)
    except InputError as e:
        click.echo(str(e), err=True)
        sys.exit(2)
    except click.ClickException as e:
        click.echo(f"{name}: {e.format_message()}", err=True)
        sys.exit(2)
    except OSError as e:
        where = e.filename or ("what it writes" if full_disk(e) else None)
        if e.errno not in PATH_ERRORS or not where:
            raise
        click.echo(f"{name}: {where}: {e.strerror}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)


def _option(parameter: inspect.Parameter, text: str) -> click.Option:
    kind = parameter.annotation
    required = parameter.default is inspect.Parameter.empty and not _is_metrics(kind)
    flag, metavar = f"--{parameter.name.replace('_', '-')}", None
    if parameter.name == "spec":
        metavar = "FILE"
    elif type_annotations.is_artifact_wrapped_in_Output(kind):
        metavar, text = "PATH", f"{text} [written]"
    elif type_annotations.is_artifact_wrapped_in_Input(kind):
        metavar = "PATH"
    elif kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=parameter.default, show_default=True, help=text)
    elif _is_json(kind):
        metavar = "JSON"
    absent = parameter.default in (None, "", inspect.Parameter.empty)
    default = {} if absent else {"default": parameter.default, "show_default": True}
    return click.Option(
        [flag, parameter.name], metavar=metavar, type=int if kind is int else str, required=required, help=text, **default
    )


def _is_json(kind: Any) -> bool:
    return (get_origin(kind) or kind) in (dict, list)


def _is_metrics(kind: Any) -> bool:
    """Whether it is an output of figures, which a person may leave out."""
    return type_annotations.is_artifact_wrapped_in_Output(kind) and get_args(kind)[0] is dsl.Metrics


def _run(function: Callable[..., Any], kinds: dict[str, Any], changes: tuple[str, ...] = (), **values: Any) -> None:
    arguments = {name: _argument(name, kinds[name], value, changes) for name, value in values.items()}
    arguments |= {name: dsl.Metrics(name=name) for name, value in values.items() if value is None and _is_metrics(kinds[name])}
    written = {n: v for n, v in values.items() if v and type_annotations.is_artifact_wrapped_in_Output(kinds[n])}
    remote = {name: value for name, value in written.items() if storage.is_remote(value)}
    publishes = os.environ.get("RANK", "0") == "0"  # of the processes of a torchrun, the one that writes
    for name, uri in remote.items() if publishes else ():
        _check_place(uri, f"{function.__name__} --{name}")  # better known before the work than after it
    returned = function(**{name: value for name, value in arguments.items() if value is not None})
    for name, uri in remote.items():
        path = Path(arguments[name].path)
        if path.exists() and publishes:
            _publish(path, uri, f"{function.__name__} --{name}")
        shutil.rmtree(path.parent, ignore_errors=True)
    if returned is not None:
        fields = inspect.signature(function).return_annotation._fields
        click.echo(json.dumps(dict(zip(fields, returned, strict=True)), ensure_ascii=False))


def _check_place(uri: str, owner: str) -> None:
    """Raises InputError for a folder of other things than an earlier call of this step left there; a file is one to be written over."""
    fs, target = storage.filesystem(uri)
    if not fs.isfile(target):
        storage.check_place(uri, owner, ask="choose another place")


def _publish(path: Path, uri: str, owner: str) -> None:
    if path.is_dir():
        (path / storage.MANIFEST).write_text(storage.Manifest.of_folder(path, owner).model_dump_json())
    storage.publish(path, uri, allowed=lambda: _check_place(uri, owner))


def _argument(name: str, kind: Any, value: Any, changes: tuple[str, ...]) -> Any:
    if value is None:
        return None
    if name == "spec":
        return View.from_yaml(value, changes).to_json()
    if type_annotations.is_artifact_wrapped_in_Output(kind):
        path = Path(tempfile.mkdtemp()) / name if storage.is_remote(value) else Path(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        return _artifact(kind, name, value, path)
    if type_annotations.is_artifact_wrapped_in_Input(kind):
        return _artifact(kind, name, value, storage.local_copy(value))
    if _is_json(kind):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"--{name.replace('_', '-')}: not JSON") from None
        if not isinstance(parsed, get_origin(kind) or kind):
            raise InputError(f"--{name.replace('_', '-')}: not {'an object' if (get_origin(kind) or kind) is dict else 'a list'}")
        return parsed
    return value


def _artifact(kind: Any, name: str, uri: str, path: Path) -> dsl.Artifact:
    artifact: dsl.Artifact = get_args(kind)[0](name=name, uri=uri)
    artifact.custom_path = str(path)
    return artifact
