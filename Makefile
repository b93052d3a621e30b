# llmcompress: every target is a line a user could type. `make` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP  := $(VENV)/.ready
# processes of the tests, of one thread each where they are several; a file of tests stays in one
JOBS   ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check fix schema kernels bench acceptance report-check family family-smollm2 \
	repro-eac-moe repro-q-mamba repro-rqt repro-s2r clean

help: ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once) ..."
	@$(PIP) "$(TORCH)"
	@$(PIP) -c constraints.txt -e ".[export,serve,structured]"
	@touch $@

$(VENV)/.dev: $(STAMP)
	@$(PIP) -c constraints.txt pytest hypothesis ruff mypy types-PyYAML types-psutil codespell pytest-xdist triton openai trl peft
	@touch $@

setup: $(STAMP) ## Create .venv and install everything a user needs
	@$(BIN)/llmcompress doctor

demo: $(STAMP) ## Compress the shipped MoE model, print the table, write the report
	@$(BIN)/llmcompress run quickstart run.dir=runs/demo --force

test: $(VENV)/.dev ## Run the whole test suite; JOBS=2 in two processes
	@$(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=1 )$(BIN)/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile)

test-fast: $(VENV)/.dev ## Run the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/.dev ## Format, lint, types, layers, spelling, schema; changes nothing
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python scripts/lint_layers.py
	@$(BIN)/codespell llmcompress kernels recipes scripts tests docs *.md
	@$(BIN)/llmcompress schema | cmp - recipes/recipe.schema.json || { echo "the schema is old: make schema"; exit 1; }

fix: $(VENV)/.dev ## Format and fix what ruff can fix
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

schema: $(STAMP) ## Rewrite recipes/recipe.schema.json
	@$(BIN)/llmcompress schema > recipes/recipe.schema.json

kernels: $(STAMP) ## Compile the native kernels ahead of time
	@$(BIN)/python -m llmcompress_kernels build

bench: $(STAMP) ## Time the demo's compressed model against its dense twin
	@$(BIN)/llmcompress bench model runs/demo/artifact

acceptance: $(VENV)/.dev ## Run every acceptance script and write benchmarks/acceptance.json
	@$(BIN)/python scripts/acceptance/run_all.py

report-check: $(VENV)/.dev ## Open the demo's report in headless Chromium, phone and wide, light and dark
	@$(BIN)/python scripts/check_report.py runs/demo

family: $(STAMP) ## Train the reference family of rqt_tiny: needs FAMILY_DATA=folder with lm/, ft/ and tasks/
	@test -n "$(FAMILY_DATA)" || { echo "set FAMILY_DATA to the folder with lm/books, lm/tinyshakespeare.jsonl.gz, ft and tasks/gsm8k"; exit 2; }
	$(BIN)/python scripts/make_family_texts.py --data $(FAMILY_DATA) --out runs/family
	$(BIN)/python scripts/train_family.py --texts runs/family --out runs/family --start recipes/assets/reference_moe --threads 2

family-smollm2: $(STAMP) ## Train four fine-tunes of SmolLM2-135M: needs FAMILY_DATA=FOLDER, SMOLLM2=FOLDER; DEVICE=cuda to use a GPU
	@test -n "$(FAMILY_DATA)" -a -n "$(SMOLLM2)" || { echo "set FAMILY_DATA as for make family, SMOLLM2 to what scripts/smollm2_to_hf.py wrote"; exit 2; }
	$(BIN)/python scripts/make_family_texts.py --data $(FAMILY_DATA) --out runs/family_smollm2
	$(BIN)/python scripts/train_family.py --texts runs/family_smollm2 --out runs/family_smollm2 --start $(SMOLLM2) \
		--members maths code chat spanish --child-tokens 1.5e6 --child-epochs 3 --child-rows 32 --child-lr 1e-4 \
		$(if $(filter cuda,$(DEVICE)),--device cuda --parallel --every 0,--threads 2 --every 20)

# a stopped target continues with the same command; times have not been measured: llmcompress plan predicts them for CPUs.
# REPRO_ARGS: settings of your own, such as other data, fewer samples or run.dir; what they change is no longer the paper's
define REPRO
	@echo "$(1): ends with a table and report.html in $(or $(patsubst run.dir=%,%,$(filter run.dir=%,$(REPRO_ARGS))),runs/$(1)); started again it goes on where it stopped"
	@echo "compare with $(2)"
	@echo "one seed, 0 (run.seed); ± in the table is the error of the difference on the same rows; deviations: PAPERS.md"
endef

repro-eac-moe: $(STAMP) ## EAC-MoE, Tables 2 and 4: needs REPRO_MODEL=/path of Mixtral, a GPU with 116 GB; writes runs/eac_moe_mixtral
	@test -n "$(REPRO_MODEL)" || { echo "set REPRO_MODEL=/path/to/Mixtral-8x7B-v0.1"; exit 2; }
	$(call REPRO,eac_moe_mixtral,arXiv 2508.01625: Table 2 for wikitext2.perplexity_without_policies (QESC at 3.03 bits 4.14; 16 bits 3.84) and Table 4 for tasks.mean_acc (with PESF 71.68; 16 bits 72.64))
	$(BIN)/llmcompress run eac_moe_mixtral model.path="$(REPRO_MODEL)" $(REPRO_ARGS)

repro-q-mamba: $(STAMP) ## Q-Mamba, W8A8H4: needs REPRO_MODEL=/path of a Mamba-2, a GPU with 12 GB for 2.7b; writes runs/q_mamba_mamba2
	@test -n "$(REPRO_MODEL)" || { echo "set REPRO_MODEL=/path/to/mamba2-2.7b-hf"; exit 2; }
	$(call REPRO,q_mamba_mamba2,the abstract (its tables were not at hand): W8A8H4 of Mamba2-2.7B loses 2.13 % of accuracy on zero-shot tasks (tasks.mean_acc) and half the memory)
	@echo "ours is on by default: for rounding as in the paper REPRO_ARGS='stages.states.rounding=rtn stages.states.replay_window=1'"
	$(BIN)/llmcompress run q_mamba_mamba2 model.path="$(REPRO_MODEL)" $(REPRO_ARGS)

repro-rqt: $(STAMP) ## RQT, 2.2 bits: needs REPRO_MODEL=/path of Mistral-7B, REPRO_MEMBERS=its fine-tunes, a GPU with 18.5 GB; writes runs/rqt_mistral
	@test -n "$(REPRO_MODEL)" -a -n "$(REPRO_MEMBERS)" || \
		{ echo "set REPRO_MODEL=/path/to/Mistral-7B-v0.1 REPRO_MEMBERS=/folder (llmcompress recipes show rqt_mistral names them)"; exit 2; }
	$(call REPRO,rqt_mistral,the abstract (its tables were not at hand): about 3 % of accuracy lost at about 2 bits. Other models: nothing to compare value by value)
	@echo "the table has perplexities; a member's accuracy: llmcompress eval runs/rqt_mistral --member NAME --task gsm8k, and of its folder"
	$(BIN)/llmcompress run rqt_mistral model.path="$(REPRO_MODEL)" vars.models="$(REPRO_MEMBERS)" $(REPRO_ARGS)

repro-s2r: $(STAMP) ## S2R-ORL, Table 2: needs REPRO_MODEL=/path of Qwen2-7B, REPRO_TASK=TRAIN.jsonl, REPRO_VERIFIER=model, a GPU with 146 GB; writes runs/s2r_qwen2_7b
	@test -n "$(REPRO_MODEL)" -a -n "$(REPRO_TASK)" -a -n "$(REPRO_VERIFIER)" || \
		{ echo "set REPRO_MODEL=/path/to/Qwen2-7B-Instruct REPRO_TASK=TRAIN.jsonl REPRO_VERIFIER=NAME, and REPRO_ARGS=vars.task.test_path=TEST.jsonl"; exit 2; }
	@$(BIN)/python -c "import math_verify" 2>/dev/null || $(PIP) -c constraints.txt -e ".[math]"
	$(call REPRO,s2r_qwen2_7b,Table 2 of arXiv 2502.12853 if TRAIN.jsonl and the held-out problems are those of MATH: 51.2 before 61.2 after init and 64.8 after reinforce on MATH500)
	$(BIN)/llmcompress run s2r_qwen2_7b model.path="$(REPRO_MODEL)" vars.task.path="$(REPRO_TASK)" stages.init.verifier.model="$(REPRO_VERIFIER)" $(REPRO_ARGS)

clean: ## Remove runs and caches (not .venv)
	@rm -rf runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
