"""The process in which one submitted pipeline runs, with `kfp.local`."""

import json
import warnings
from pathlib import Path

import yaml
from kfp import components, local

from pipelines.local import for_this_machine
from pipelines.steps import warm_steps


def execute(folder: Path) -> None:
    """Runs pipeline.yaml of the folder with parameters.json."""
    warnings.simplefilter("ignore")
    pipeline = for_this_machine((folder / "pipeline.yaml").read_text())
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder))
    with warm_steps():
        run = components.load_component_from_text(yaml.dump(pipeline, Dumper=yaml.CSafeDumper))
        run(**json.loads((folder / "parameters.json").read_text()))
