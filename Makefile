# Everything sets up .venv by itself: `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
# Extra index for torch, for example that of its CPU wheels; empty: the default index.
TORCH_INDEX ?=
DATA ?= ../shared/data
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint benchmark docs clean

help:
	@echo "make demo       learn from half a photograph, super-resolve the other half, write demo/report.html"
	@echo "make install    make .venv and install all into it, as the others do by themselves"
	@echo "make test       run the tests"
	@echo "make lint       check format, style and types"
	@echo "make benchmark  rerun the tables on the data in DATA=$(DATA)"
	@echo "make docs       build the documentation"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch comes first: what depends on it would otherwise choose another build.
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/patchflow demo --output demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

benchmark: $(STAMP)
	mkdir -p benchmarks/results benchmarks/models
	$(BIN)/patchflow benchmark patchnr-superresolution --data $(DATA) --threads 2 --models benchmarks/models \
		--methods [bicubic,tikhonov,tv,tgv,wpp,wpp-sinkhorn,local-ar,epll,patchnr-90s,patchnr,dip-tv] \
		--json benchmarks/results/patchnr-superresolution.json --csv benchmarks/results/patchnr-superresolution.csv
	for problem in deblurring inpainting denoising; do \
		$(BIN)/patchflow benchmark $$problem --data $(DATA) --threads 2 --models benchmarks/models \
			--json benchmarks/results/$$problem.json --csv benchmarks/results/$$problem.csv || exit 1; \
	done
	$(BIN)/patchflow benchmark zero-shot-superresolution --data $(DATA) --threads 2 \
		--json benchmarks/results/zero-shot-superresolution.json --csv benchmarks/results/zero-shot-superresolution.csv
	$(BIN)/python benchmarks/epll.py --data $(DATA)
	$(BIN)/python benchmarks/auto_weight.py --data $(DATA) --models benchmarks/models
	for problem in ct-low-dose ct-limited-angle; do \
		$(BIN)/patchflow benchmark $$problem --data $(DATA) --threads 2 \
			--json benchmarks/results/$$problem.json --csv benchmarks/results/$$problem.csv || exit 1; \
	done
	# Needs the extra astra, half a gigabyte: pip install -e '.[astra]'.
	-$(BIN)/python benchmarks/projector.py
	$(BIN)/patchflow benchmark snf-mixture --threads 1 \
		--json benchmarks/results/snf-mixture.json --csv benchmarks/results/snf-mixture.csv
	$(BIN)/patchflow benchmark snf-scatterometry --data $(DATA) --threads 1 \
		--json benchmarks/results/snf-scatterometry.json --csv benchmarks/results/snf-scatterometry.csv
	$(BIN)/patchflow benchmark sbibm --data $(DATA) --threads 1 \
		--json benchmarks/results/sbibm.json --csv benchmarks/results/sbibm.csv
	$(BIN)/python benchmarks/snf_speed.py
	$(BIN)/python benchmarks/talk_examples.py
	$(BIN)/python benchmarks/flows_2d.py --threads 1
	$(BIN)/python benchmarks/patch_gradient.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/training.py --data $(DATA)
	$(BIN)/patchflow train patch-nr $(DATA)/material/img_learn_material.png --grey --seconds 300 --threads 2 \
		--validation $(DATA)/material/img_val_material.png --output benchmarks/results/prior.safetensors
	$(BIN)/python benchmarks/published_procedure.py --data $(DATA) --model benchmarks/results/prior.safetensors

docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .ruff_cache
