# The commands that a developer learns; .ci/run calls the same ones.
.DEFAULT_GOAL := help
.PHONY: help env env-dev demo cluster-smoke observe dashboards stop test test-fast test-faults check lint format lock lock-check clean

VENV ?= .venv
# The first interpreter that starts and has a supported version (a version manager's shim may exist and still refuse).
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$name -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$name && break; done)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
TORCH_INDEX_URL ?=
KEEP ?= 1
FROM_SCRATCH ?= 0
PYTEST_ARGS ?=
PYTEST = $(VENV)/bin/python -m pytest
# A folder for JUnit reports, one for each run of pytest.
REPORTS ?=
BENCH_ARGS ?=
# Needs torch, diffusers, transformers and PyAV of the machine's own.
BENCH_PRESET ?= wan-1.3b
BENCH_FOLDER ?= docs/results
BENCH = env PYTHONPATH=platform $(or $(BENCH_PYTHON),python3) -m diagonal.evaluate.bench --preset $(BENCH_PRESET)
UV ?= uv
# Asked for on Windows or in a browser alone.
ELSEWHERE = colorama httpx2-jsfetch pywin32 tzdata

HAS_GPU = $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# `===` compares the version letter by letter, so on a GPU machine a local CPU build can never stand in for the plain one.
TORCH = $(if $(TORCH_INDEX_URL),torch==2.13.0,$(if $(HAS_GPU),torch===2.13.0,torch==2.13.0))
PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

help: ## show this list
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' Makefile
	@echo "Variables:"
	@echo "  PYTHON=...           interpreter for the environment, 3.11 to 3.14 (found by itself)"
	@echo "  VENV=...             folder of the environment (default .venv)"
	@echo "  TORCH_INDEX_URL=...  extra package index for torch. Without a GPU, give PyTorch's CPU index here: it holds"
	@echo "                       $(TORCH) without CUDA and saves several GB. Default: your own pip settings"
	@echo "  KEEP=0               demo: end everything at the end (default 1: the service stays up until make stop)"
	@echo "  FROM_SCRATCH=1       demo: train every stage instead of starting from the embedded weights"
	@echo "  UV=...               lock: the program that finds the hashes (pip install uv)"
	@echo "  BENCH_ARGS=...       bench, bench-gpu: further options, see python -m diagonal.evaluate.bench --help"
	@echo "  PYTEST_ARGS=...      tests: passed to pytest, for example '-k cache' or '-m \"not slow\"'"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || \
		{ echo "Python 3.11 to 3.14 is needed, and none was found: give one with PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) '$(TORCH)' --editable '.[train,serve,completion]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) '$(TORCH)' --editable '.[dev]'
	@touch $(VENV)/run.stamp $@

env: $(VENV)/run.stamp ## make the environment that training and serving need

env-dev: $(VENV)/dev.stamp ## add what tests and linters need

demo: env ## serve, distil on Ray meanwhile, serve that too, stream demo.mp4; stays up (KEEP=0: does not)
	@PYTHONPATH=platform:. KEEP=$(KEEP) FROM_SCRATCH=$(FROM_SCRATCH) $(VENV)/bin/python -m infra.local.demo

observe: env ## a Prometheus with the project's rules beside a demo that is up (PROMETHEUS=... names the binary)
	@PYTHONPATH=platform:. $(VENV)/bin/python -m infra.local.observe

dashboards: env-dev ## write the dashboards' JSON from their code
	@PYTHONPATH=platform:. $(VENV)/bin/python -m infra.grafana.build

cluster-smoke: env ## distil and serve on a local cluster of four nodes, lose one, recover (about 4 minutes)
	@PYTHONPATH=platform:. $(VENV)/bin/python -m infra.local.cluster_smoke

stop: ## end the local Ray and the service, by process id
	@PYTHONPATH=platform:. $(VENV)/bin/python -m diagonal.cli down

# The tests that $(1) chooses, in two runs of pytest: side by side, then those that need the machine for themselves.
# pytest ends with 5 where a choice (-k) left nothing of a part; that is no failure while the other part has some.
PART ?= together alone
CHOICE ?= faults
define in_parts
	@status=5; for part in $(PART); do \
		spread=; [ $$part = alone ] || spread="-n logical --maxprocesses=4 --dist=loadscope"; \
		$(PYTEST) $(1) $(if $(REPORTS),--junitxml=$(REPORTS)/$@-$$part.xml) --part=$$part $$spread $(PYTEST_ARGS); \
		one=$$?; [ $$status = 5 ] && status=$$one || [ $$one = 0 ] || [ $$one = 5 ] || status=$$one; \
	done; [ $$status = 0 ]
endef

test: env-dev ## run the tests, but not those below: side by side, then those that start Ray or a browser
	$(call in_parts,--ignore=tests/faults)

test-fast: PART = together
test-fast: env-dev ## before a commit: the tests without Ray, without a browser and not slow (under 2 minutes)
	$(call in_parts,--ignore=tests/faults -m "not slow")

test-faults: env-dev ## end workers, nodes, replicas, gateways; break files, storage, networks (half an hour; CHOICE=ci: ten)
	$(call in_parts,-m $(CHOICE) tests/faults)

bench: env ## measure speed of the embedded model on this CPU (about 3 minutes): docs/results/speed.md
	PYTHONPATH=platform $(VENV)/bin/python -m diagonal.evaluate.bench --preset tiny --no-compile --threads 1 \
		--chunks 24 --sessions 16 --media-s 6 --session-minutes 0.8 --minutes 2.8 \
		--out docs/results/speed-cpu.json $(BENCH_ARGS)

bench-gpu: ## measure every GPU row of docs/results/speed.md on a bare GPU machine, in under 9 minutes
	-timeout 300 $(BENCH) --decoder fast --minutes 4.5 --session-minutes 0.7 --sections rates client sessions growth \
		--out $(BENCH_FOLDER)/speed-gpu-fast.json $(BENCH_ARGS)
	-timeout 220 $(BENCH) --decoder full --minutes 3.4 --sections rates client schedules \
		--out $(BENCH_FOLDER)/speed-gpu-full.json $(BENCH_ARGS)
	PYTHONPATH=platform $(or $(BENCH_PYTHON),python3) -m diagonal.evaluate.bench.page $(BENCH_FOLDER)

check: lint ## ruff and mypy
	$(VENV)/bin/python -m mypy platform/diagonal jobs serve infra tests

lint: env-dev ## ruff alone: rules, then format
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

format: env-dev ## format the code
	$(VENV)/bin/python -m ruff format .

requirements.lock: pyproject.toml constraints.txt
	@echo '# Every package of constraints.txt with the hashes of its files, for every Python and system that is supported;' > $@.new
	@echo '# but torch, whose build differs by machine. Made by `make lock`. Install torch first, then:' >> $@.new
	@echo '# pip install --require-hashes --no-deps -r requirements.lock' >> $@.new
	@printf '%s\n' torch $(ELSEWHERE) > $@.without
	@$(UV) pip compile pyproject.toml --all-extras --constraint constraints.txt --excludes $@.without --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-header --quiet >> $@.new
	@rm $@.without && mv $@.new $@

lock: requirements.lock ## renew requirements.lock from constraints.txt; needs uv

lock-check: $(VENV)/bin/python ## resolve requirements.lock by its hashes alone; installs nothing, needs the network
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps --dry-run \
		--ignore-installed --requirement requirements.lock

clean: ## remove caches and build output (not the environment, not runs/)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis platform/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
