# make demo   one command: environment, then the whole job on the embedded sandbox (DEMO=short for CI)
# make test   all tests          make check   lint and types          make venv   the environment alone
# A CUDA build: make venv TORCH_INDEX=https://download.pytorch.org/whl/cu128

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
DEMO ?= full

BIN := $(VENV)/bin
# The name of the stamp holds what torch was asked for, so another TORCH_SPEC or TORCH_INDEX installs anew.
STAMP := $(VENV)/.installed-$(shell echo '$(TORCH_SPEC) $(TORCH_INDEX)' | cksum | cut -d' ' -f1)
CONFIG := $(if $(filter short,$(DEMO)),configs/demo_short.yaml,configs/demo.yaml)

.PHONY: demo test check format venv

demo: venv
	@$(BIN)/alignkit run --config $(CONFIG)

# One thread a worker: several pools of threads on the same cores wait for each other.
test: venv
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(STAMP)

# torch comes from TORCH_INDEX where that answers (the CPU build has no other home), else from wherever pip finds it.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a few minutes on a fresh machine ..."
	@index=""; $(BIN)/python -c "import urllib.request as u; u.urlopen('$(TORCH_INDEX)/torch/', timeout=5)" 2>/dev/null \
		&& index="--extra-index-url $(TORCH_INDEX)"; \
	$(BIN)/python -m pip install --quiet $$index "$(TORCH_SPEC)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@rm -f $(VENV)/.installed-*
	@touch $@
