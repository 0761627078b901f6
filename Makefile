# make demo         explain a sentence with the shipped model
# make test         run the whole test suite
# make test-native  run the tests of mamba_ssm's and flash-linear-attention's own layers
# make test-packages  run the tests of the layers of mambapy, minGRU-pytorch, s5-pytorch, torchscale, rwkv7-hf, xlstm, ...
# make test-deployed  run the tests of fine-tuned, quantised and placed models, with peft, bitsandbytes, torchao, ...
# make test-hosts   run the tests of PEFT, nnsight, TransformerLens, Lightning, sentence-transformers, inseq, shap, quantus
# make test-ray     run the tests of whole data sets, with pyarrow, datasets and a local cluster of Ray
# make test-pages   run the tests of pages in a headless Chromium; apt-get install chromium
# make test-versions  run the tests that hold on every release of transformers, on each that is supported; with
#                   VERSIONS="4.57 5.24" on these
# make test-lowest  run them on the lowest versions of all that pyproject.toml claims; installs gigabytes
# make check-sdist  build the source distribution, and run some of its tests in it
# make peers        measure methods and libraries that users compare with, and write docs/peers.md
# make docs         build the documentation site into out/docs/html; a broken link or a missing docstring fails
# make check-docs   the same in a minute, without the outputs of the tutorials
# make dist         build the source distribution and the wheel into dist/, and judge their metadata by twine
# make release      do all that RELEASING.md asks for but the upload
# The first two build .venv on first use, the others an environment of their own; the next run takes seconds.

PYTHON ?= python3
VENV := .venv
# one process for each core, each with one thread: several times faster on tiny models; WORKERS=0 for a single process
WORKERS ?= auto
PYTEST := python -m pytest -n $(WORKERS) --maxprocesses 8
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE_PIP = $(NATIVE)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-native.txt
NATIVE := .venv-native
OVERLAYS := packages deployed hosts ray pages
VERSIONS := $(shell sed -n 's/^\([0-9.]*\) .*/\1/p' constraints-versions.txt)
WITHOUT_CUDA ?= MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
	CAUSAL_CONV1D_FORCE_BUILD=TRUE
TEXT ?= I expected a masterpiece, but the plot is a mess and the acting is wooden.

.PHONY: demo test test-native $(OVERLAYS:%=test-%) test-versions test-lowest lint check-sdist docs check-docs dist release bench bench-check benchmark peers clean

demo: $(VENV)/cli.done
	$(VENV)/bin/captum-ssm explain "$(TEXT)" --html out/explanation.html --png out/explanation.png

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/$(PYTEST) $(PYTEST_ARGS)

test-native: $(NATIVE)/native.done
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(NATIVE)/bin/$(PYTEST) tests/native $(PYTEST_ARGS)

test-ray: PYTEST += --dist loadgroup
$(OVERLAYS:%=test-%): test-%: .venv-%/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-$*/bin/$(PYTEST) tests/$* $(PYTEST_ARGS)

test-versions: $(VERSIONS:%=test-transformers-%)

$(VERSIONS:%=test-transformers-%): test-transformers-%: .venv-versions/%/installed
	@echo "transformers $*"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-versions/$*/bin/$(PYTEST) -rs tests/versions $(PYTEST_ARGS)

# The lowest versions that pyproject.toml claims, torch included: gigabytes, so no part of .ci/run.
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-lowest/bin/$(PYTEST) tests/versions $(PYTEST_ARGS)

.venv-lowest/installed: constraints-lowest.txt
	@rm -rf .venv-lowest
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

lint: $(VENV)/dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check-sdist: $(VENV)/dev.done
	$(VENV)/bin/python -m scripts.check_sdist

docs: .venv-docs/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-docs/bin/python -m scripts.build_docs

check-docs: .venv-docs/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-docs/bin/python -m scripts.build_docs --unexecuted

dist: .venv-release/installed
	rm -rf dist
	.venv-release/bin/python -m build --no-isolation .
	.venv-release/bin/python -m twine check --strict dist/*

release: .venv-release/installed
	.venv-release/bin/python -m scripts.release
	$(MAKE) check-sdist dist
	.venv-release/bin/python -m scripts.release --try dist

# Measures speed and memory on one core, half an hour; stores the figures, and writes the table of docs/speed.md from them.
bench: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.speed --json benchmarks/speed.json --page

# Measures again and compares with the stored figures: fails, naming what became more than 10 % slower.
bench-check: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.speed --check benchmarks/speed.json

# Measures the methods against each other: seconds if all is stored, an hour or so on one core if no figures are, hours
# if the weights are gone too. See benchmarks/RESULTS.md.
benchmark: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.run
	$(VENV)/bin/python -m benchmarks.report

# Compares with other packages; what is stored is measured again. ONLY="times tasks" leaves the other parts as they are.
peers: .venv-peers/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-peers/bin/python -m benchmarks.peers $(if $(ONLY),--only $(ONLY))

$(VENV)/%.done: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing captum-ssm[$*] into $(VENV) (some minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable '.[$*]'
	@touch $@

$(VENV)/bin/python $(NATIVE)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "captum-ssm needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(@D)/..

# transformers calls these packages as soon as they are installed, so they get an environment of their own. They are
# built against the torch that is there; with a GPU and its compiler: make test-native WITHOUT_CUDA=
$(NATIVE)/native.done: pyproject.toml constraints.txt constraints-native.txt | $(NATIVE)/bin/python
	@echo "Installing captum-ssm[native] into $(NATIVE) (some minutes the first time)"
	@$(NATIVE_PIP) torch
	@$(NATIVE_PIP) --editable '.[native]'
	@$(WITHOUT_CUDA) $(NATIVE_PIP) --no-cache-dir --no-build-isolation --no-deps \
		mamba-ssm causal-conv1d flash-linear-attention fla-core
	@touch $@

# An environment on top of the main one, whose torch and pip it uses.
define OVERLAY
@rm -rf $(@D)
@$(VENV)/bin/python -m venv --without-pip $(@D)
@$(VENV)/bin/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	> $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth
endef

# Packages on top of it: constraints-NAME.txt lists all that is installed, as nothing is installed for being asked for by
# another package.
$(OVERLAYS:%=.venv-%/installed) .venv-docs/installed .venv-peers/installed .venv-release/installed: .venv-%/installed: \
		constraints-%.txt $(VENV)/test.done
	@echo "Installing the packages of constraints-$*.txt into .venv-$*"
	$(OVERLAY)
	@.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

$(VERSIONS:%=.venv-versions/%/installed): .venv-versions/%/installed: constraints-versions.txt $(VENV)/test.done
	@echo "Installing transformers $* into $(@D)"
	$(OVERLAY)
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $$(sed -n 's/^$* //p' $<)
	@touch $@

clean:
	rm -rf $(VENV) $(NATIVE) $(OVERLAYS:%=.venv-%) .venv-docs .venv-peers .venv-release .venv-versions .venv-lowest out build *.egg-info
