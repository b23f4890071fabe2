# make demo   sets up and runs the main job on two real models, on a CPU
# make pilot  is it worth it? short runs on the demo's models, and a verdict
# make test   sets up and runs the tests
# make docs   builds the documentation in build/site
#
# PYTHON=python3.12          another interpreter
# CONSTRAINTS=gpu.txt        other pins (constraints.txt pins the CPU-tested versions; empty: no pins)
# SET="a.b=1 c.d=2"          overrides of the demo's spec

PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2
VENV        := .venv
BIN         := $(VENV)/bin
PIP_INSTALL  = $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
PYTEST       = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
OVERRIDES    = $(foreach s,$(SET),--set $(s))

.PHONY: demo pilot test test-fast image-test lint format compile docs clean

demo: $(VENV)/.installed
	@echo "The demo: SmolLM2-135M loses 18 of its 30 layers, and with them its language. Two teachers give some of it back:"
	@echo "Gemma-3-270M, which has another tokenizer, and the whole SmolLM2. Beside it a twin learns from the text only."
	@echo "At the end: a table of bits per byte on held-out text with a verdict, and runs/demo/output/report.html."
	$(BIN)/python -m pipelines.demo_models
	$(BIN)/python -m pipelines run pipelines/specs/demo.yaml $(OVERRIDES)

pilot: $(VENV)/.installed
	@echo "A pilot of the demo: which teachers, in which mode, are worth a run of 40 steps? Short runs of two candidates, and a verdict."
	$(BIN)/python -m pipelines.demo_models
	$(BIN)/python -m pipelines run pipelines/specs/pilot.yaml $(OVERRIDES)

test: $(VENV)/.installed-test
	$(PYTEST)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

# builds the image by buildah and runs a spec in it: some ten minutes, as root, with Debian's buildah and debootstrap
image-test: $(VENV)/.installed-test
	XTOKEN_IMAGE=1 $(BIN)/python -m pytest -s tests/conformance/test_image.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile: $(VENV)/.installed
	$(BIN)/python -m pipelines compile

docs: $(VENV)/.installed-test
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs build dist *.egg-info

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) -e ".[test,eval,lora,registry,tracking,docs]"
	@touch $@
