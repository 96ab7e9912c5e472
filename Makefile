# Everything runs in .venv, made from locks/$(PLATFORM).txt the first time and again whenever that lock changes.
#   PLATFORM=cpu|cuda    default: cuda where nvidia-smi sees a GPU, else cpu
#   PYTHON=python3.12    default: the first of python3.11, python3.12, python3.13, python3 in that range
#   WORKERS=2            processes that tests run in (0: one, where they share a GPU)
#   ARGS="..."           more arguments for what `make demo`, `make test`, `make faults` and the like run
# Refused, with a reason: other Pythons than 3.11 to 3.13, other machines than Linux x86_64.

PYTHON   ?=
PLATFORM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
VENV     ?= .venv
WORKERS  ?= $(if $(filter cuda,$(PLATFORM)),0,2)
ARGS     ?=
UV       ?= uv
UPGRADE  ?=

platform := $(PLATFORM)
run      := $(VENV)/bin/python -m
digest    = $(shell { echo "$(platform) $(PYTHON)"; cat $(1) 2>/dev/null; } | cksum | cut -d ' ' -f 1)
locked   := $(VENV)/.locked-$(call digest,locks/$(platform).txt)
ready    := $(VENV)/.ready-$(call digest,locks/$(platform).txt pyproject.toml)
resolve   = $(UV) pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
            --custom-compile-command "make locks" $(UPGRADE)

.PHONY: help environment install demo demo-curate demo-criteria demo-onties-orthalign test tests faults faults-disk faults-ray fuzz lowest test-python image-check audit lint benchmarks gpu-check docs \
        site locks clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@echo "make demo runs the pipeline on a small real model, make test checks everything. All targets:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
	    printf '%-29s %s\n' "$$target" "$$text"; done
	@echo "Platform: $(platform) (PLATFORM=cpu or PLATFORM=cuda overrides)"

install: $(ready) ## make .venv from the platform's lock, with this project in it

environment: $(locked) ## the same without this project (a container's cached layer)

$(locked):
	@sh locks/install.sh "$(VENV)" "$(platform)" "$(PYTHON)"
	@touch "$@"

$(ready): $(locked)
	@$(run) pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch "$@"

demo: $(ready) ## the whole pipeline on a small real model, into runs/demo
	@$(run) pipeline run data/configs/demo.yaml $(ARGS)

demo-curate: $(ready) ## curate an existing preference set with known errors, and say how many were found, into runs/demo-curate
	@$(run) pipeline run data/configs/demo-curate.yaml --until select $(ARGS)

demo-criteria: $(ready) ## answers judged by two criteria, pairs for each, OrthAlign training them one after the other
	@$(run) pipeline run data/configs/demo-criteria.yaml $(ARGS)

demo-onties-orthalign: $(ready) ## base, SFT, then DPO with OnTIES and OrthAlign over two language groups
	@$(run) pipeline run data/configs/demo-onties-orthalign.yaml $(ARGS)

test: $(ready) ## lint, types, import directions and, beside them, every test
	@$(MAKE) --no-print-directory --jobs 2 lint tests

tests: $(ready) ## every test, without the lint (ARGS="tests/stages/select -x": some)
	$(run) pytest -n $(WORKERS) --no-loadscope-reorder $(ARGS)

faults: $(ready) ## kill and break runs in every way we know (ARGS="--kills 200 --seed 0")
	$(run) tests.faults.kills $(ARGS)

faults-disk: $(ready) ## fill up the disk in every stage of a run, then make room (Linux, root or user namespaces; ARGS="--only train")
	$(run) tests.faults.disks $(ARGS)

faults-ray: $(ready) ## strike nodes, workers and drivers of runs on a real Ray cluster on this machine (ARGS="--kills 100 --seed 0")
	$(run) tests.faults.kills_ray $(ARGS)

fuzz: $(ready) ## many configs, prompt and preference files, broken in every way (minutes)
	HYPOTHESIS_PROFILE=long $(run) pytest --timeout 7200 tests/pipeline/test_fuzz_config.py \
	    tests/stages/prompts/test_fuzz_prompts.py tests/stages/pairs/test_fuzz_pairs.py $(ARGS)

lowest: ## the core's tests with the lowest versions that pyproject.toml allows (needs uv)
	@UV="$(UV)" ARGS="$(ARGS)" locks/core.sh "$(or $(PYTHON),python3.11)" lowest

test-python: ## the core's tests with another Python, in an environment of their own (PYTHON=python3.13)
	@ARGS="$(ARGS)" locks/core.sh "$(or $(PYTHON),python3.12)" locked

image-check: ## build docker/Dockerfile.$(PLATFORM) with buildah and run it as two users (root, ten minutes; docker/README.md)
	@docker/check.sh $(platform)

audit: ## known vulnerabilities in the locked packages (asks PyPI; pip-audit gets an environment of its own)
	@test -x "$(VENV)-audit/bin/pip-audit" || { $(or $(PYTHON),python3) -m venv "$(VENV)-audit" && \
	    "$(VENV)-audit/bin/pip" install --quiet --disable-pip-version-check pip-audit; }
	@status=0; for lock in cpu cuda; do echo "locks/$$lock.txt"; \
	    sed 's/+[a-z0-9]*$$//' locks/$$lock.txt > "$(VENV)-audit/$$lock.txt"; \
	    "$(VENV)-audit/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner off \
	        -r "$(VENV)-audit/$$lock.txt" $(ARGS) || status=1; done; exit $$status

lint: $(ready) ## ruff, mypy, import-linter
	$(run) ruff check .
	$(run) ruff format --check .
	$(run) mypy
	"$(VENV)/bin/lint-imports"

benchmarks: $(ready) ## the short benchmarks of docs/benchmarks.md, on this machine (about ten minutes on two cores)
	$(run) benchmarks.prompts
	$(run) benchmarks.gradients
	$(run) benchmarks.generate
	$(run) benchmarks.conflict_scale --pairs 50000

gpu-check: ## right results and speed on this machine's GPU, in minutes; on a CPU small sizes (ARGS="--out FILE")
	@$(if $(wildcard $(VENV)/bin/python),$(run),python3 -m) benchmarks.gpu_check $(ARGS)

docs: $(ready) ## rewrite the parts of docs/ that are generated from the code
	$(run) schemas.docs

site: ## docs/ as a website in build/site, links checked (mkdocs-material in an environment of its own)
	@test -x "$(VENV)-site/bin/mkdocs" || { $(or $(PYTHON),python3) -m venv "$(VENV)-site" && \
	    "$(VENV)-site/bin/pip" install --quiet --disable-pip-version-check "mkdocs<2" "mkdocs-material>=9.5,<10"; }
	@NO_MKDOCS_2_WARNING=1 "$(VENV)-site/bin/mkdocs" build --strict $(ARGS)

locks: ## resolve locks/*.in with uv, keeping versions that still fit (UPGRADE=--upgrade: take the newest)
	$(resolve) --extra torch --extra solvers --extra ray --extra eval --extra dev pyproject.toml locks/cpu.in -o locks/cpu.txt \
	    --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec --no-emit-package triton
	unset UV_INDEX UV_EXTRA_INDEX_URL UV_FIND_LINKS; $(resolve) --extra cuda --extra solvers --extra ray --extra eval --extra dev pyproject.toml locks/cuda.in -o locks/cuda.txt

clean: ## remove caches and build output; keeps .venv and runs
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## clean, and .venv
	rm -rf "$(VENV)" "$(VENV)-audit" "$(VENV)-site"
