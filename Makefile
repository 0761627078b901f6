# make demo   explain a sentence with the shipped model
# make test   run the whole test suite
# Both build .venv on first use; the next run takes seconds.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TEXT ?= I expected a masterpiece, but the plot is a mess and the acting is wooden.

.PHONY: demo test lint bench clean

demo: $(VENV)/cli.done
	$(VENV)/bin/captum-ssm explain "$(TEXT)" --html out/explanation.html --png out/explanation.png

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/speed.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/families.py

$(VENV)/%.done: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing captum-ssm[$*] into $(VENV) (some minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable '.[$*]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "captum-ssm needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) out build *.egg-info
