"""Runs one submitted pipeline with `kfp.local`: `python -m tests.support.execute FOLDER` (pipeline.yaml, parameters.json)."""

import json
import sys
import warnings
from pathlib import Path

import yaml
from kfp import components, local

from pipelines.local import for_this_machine
from pipelines.warm import warm_steps


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    pipeline = for_this_machine((folder / "pipeline.yaml").read_text())
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder))
    run = components.load_component_from_text(yaml.dump(pipeline, Dumper=yaml.CSafeDumper))
    with warm_steps():
        run(**json.loads((folder / "parameters.json").read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
