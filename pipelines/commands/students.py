"""What one does with a student: chat, export, push."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

from xtoken_core.errors import InputError, in_one_line

RUN = click.argument("run", metavar="RUN")
CHECKPOINT = click.option("--checkpoint", type=click.Choice(["best", "last"]), help="Default: best, if validation chose one.")
CONVERTER = "convert_hf_to_gguf.py"


@click.command(epilog="For example: xtoken chat runs/my-student/output")
@RUN
@CHECKPOINT
@click.option("--alone", is_flag=True, help="Only the student, not its former self beside it.")
@click.option("--tokens", type=click.IntRange(1, 4096), default=128, show_default=True, help="Length of an answer, at most.")
def chat(run: str, checkpoint: str | None, alone: bool, tokens: int) -> None:
    """Talk to a student, beside its former self.

    RUN is what output.uri of its run said. An empty line ends it.
    """
    from transformers.utils.logging import disable_progress_bar

    from pipelines.api import load
    from xtoken_core.evaluation.samples import answer

    disable_progress_bar()
    result = load(run)
    voices = {"student": result.student(checkpoint)}
    if not alone:
        voices = {"before": result.former_student(), **voices}
    while said := _said():
        for who, (model, tokenizer) in voices.items():
            click.echo(f"{who}> {answer(model, tokenizer, said, tokens)}")


def _said() -> str:
    """The next message; empty at the end of the input (Ctrl-D)."""
    click.echo("you> ", nl=False)
    return sys.stdin.readline().strip()


@click.command(epilog="For example: xtoken export runs/my-student/output --gguf small.gguf")
@RUN
@CHECKPOINT
@click.option("--gguf", required=True, type=click.Path(path_type=Path), help="The file to write, for llama.cpp and Ollama.")
def export(run: str, checkpoint: str | None, gguf: Path) -> None:
    """Write a student as one file, for llama.cpp and Ollama.

    RUN is what output.uri of its run said. llama.cpp's converter does it.
    """
    from pipelines.api import load
    from xtoken_core.storage import local_copy

    converter = shutil.which(CONVERTER)
    if converter is None:
        raise InputError(f"--gguf: {CONVERTER} of llama.cpp is not on the PATH; clone it and put its folder there")
    folder = local_copy(load(run).student_place(checkpoint))
    if subprocess.run([sys.executable, converter, str(folder), "--outfile", str(gguf)]).returncode:
        raise InputError(f"--gguf: {CONVERTER} could not convert {folder}; its last lines are above")
    click.echo(f"{gguf}: written")


@click.command(epilog="For example: xtoken push runs/my-student/output my-name/my-student")
@RUN
@click.argument("repository", metavar="OWNER/NAME")
@CHECKPOINT
@click.option("--public", is_flag=True, help="For all to see; default: private.")
def push(run: str, repository: str, checkpoint: str | None, public: bool) -> None:
    """Put a student, with its card, on the Hugging Face hub.

    RUN is what output.uri of its run said.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    from pipelines.api import load
    from xtoken_core.storage import local_copy

    folder = local_copy(load(run).student_place(checkpoint))
    try:
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Student of a distillation")
    except HfHubHTTPError as e:
        status, why = e.response.status_code, e.server_message or "no reason given"
        login = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        raise InputError(f"{repository}: the hub refuses ({status}): {why}{login}") from None
    except (HTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as e:
        raise InputError(f"{repository}: cannot be pushed: {in_one_line(e)}") from None
    click.echo(str(done))
