# `make demo` and `make test` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHECKPOINT := checkpoints/espeak-wav2vec2-ctc.pt
RECORDING := checkpoints/espeak-wav2vec2-ctc.reference.safetensors
# pins what is installed here, in the build environments of packages too
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check lint types fast slow bench recording clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## set up, convert the bundled checkpoint, prove it, transcribe with plain transformers (no fairseq)
	$(BIN)/fairseq-to-hf convert $(CHECKPOINT) demo-model --overwrite
	$(BIN)/fairseq-to-hf verify $(CHECKPOINT) demo-model --reference $(RECORDING)
	$(BIN)/python checkpoints/transcribe.py demo-model

test: $(VENV)/.test ## set up with fairseq, then lint, types, and all tests, in six parts, two at a time
	$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) --keep-going lint types $(addprefix part-,1 2 3 4 5 6)

# tests/conftest.py shares the files out, so that the parts take about as long as each other
part-%: $(VENV)/.test
	$(BIN)/python -m pytest --part $*/6

check: $(VENV)/.test ## lint, types, and the tests that take seconds
	$(MAKE) --no-print-directory lint types
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(VENV)/.test ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy
	$(BIN)/mypy

bench: $(VENV)/.test ## speed and memory, as ratios against cp, openssl and the bare forward passes; how far verification sees
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python benchmarks/languages.py --languages 100 300
	$(BIN)/python benchmarks/sizes.py
	$(BIN)/python benchmarks/judgement.py --environments 4

recording: $(VENV)/.test ## make fairseq's answers for the bundled checkpoint anew
	$(BIN)/fairseq-to-hf record $(CHECKPOINT) $(RECORDING) --no-long --overwrite

clean: ## remove what make made
	rm -rf $(VENV) demo-model

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch
	$(BIN)/python -m pip install -q -e ".[verify]"
	touch $@

# fairseq is archived; fairseq-fixed is its main branch with the dataclass fixes that Python 3.11 needs. Its C++ parts
# are for training only (READTHEDOCS leaves them out). Of s3prl, only the copy of unilm's WavLM.py is used. fairseq2's
# native part wants one exact torch: its models run without it. Those who train Omnilingual ASR have 0.6.0, in a folder of
# its own here.
$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q -e ".[verify,evaluate,test]" setuptools wheel
	READTHEDOCS=1 $(BIN)/python -m pip install -q --no-deps --no-build-isolation fairseq-fixed s3prl
	$(BIN)/python -m pip install -q --no-deps fairseq2 importlib_resources ruamel.yaml
	PIP_CONSTRAINT= $(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/fairseq2-0.6.0 fairseq2==0.6.0
	touch $@
