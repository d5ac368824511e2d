# The project's commands. Set PYTHON to use another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# Which build of torch to install on Linux: cpu, cuda, or auto, which is cuda if there is an NVIDIA driver.
TORCH ?= auto
# Where the CPU builds are. The build that pip finds by itself brings gigabytes of CUDA libraries on Linux.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A file of tests at a time for each core, and one more, since tests also wait; no more than four in all, since each
# may start services of its own. In the order of their names, the longest files are not last.
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help serve test test-all test-ci test-again test-long test-nightly reliability test-deploy coverage lint style types schemas format bench bench-host \
	bench-device bench-gpu bench-peer bench-open bench-infinity release dist site audit bundle docker clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

serve: $(VENV)/serve.stamp  ## serve on HOST:PORT (0.0.0.0:8001)
	$(BIN)/python app.py

test: $(VENV)/dev.stamp  ## run the tests that need only one service, in minutes: run this while you work
	$(PYTEST) -m "not deploy and not nightly and not long and not slow and (promise or not process)"

test-all: $(VENV)/dev.stamp  ## run every test except those of test-deploy, test-long and test-nightly
	$(PYTEST) -m "not deploy and not nightly and not long"

test-ci: $(VENV)/dev.stamp  ## run test-all and test-deploy together, as CI does (as root)
	$(PYTEST) -m "not nightly and not long" || $(MAKE) test-again

test-again: $(VENV)/dev.stamp  ## run once more, one after another, the tests that failed last
	@echo "Running again what failed. A test that passes now depends on what ran beside it, and needs mending:"
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -v

test-long: $(VENV)/dev.stamp  ## run the full overload, soak and fuzz tests (`test-all` has short forms)
	$(BIN)/python -m pytest -m "long and not deploy"

test-nightly: $(VENV)/dev.stamp $(VENV)/ray.stamp  ## run Ray and other long installations
	$(PYTEST) -m nightly -rP

reliability: $(VENV)/dev.stamp  ## run the full fault tests and write docs/reliability.md from the results
	rm -f build/reliability.jsonl
	$(BIN)/python -m pytest tests/faults
	$(BIN)/python -m tests.reliability

test-deploy: $(VENV)/dev.stamp  ## build and run the image, test `pip install` and rolling restarts (as root)
	$(PYTEST) -m "deploy and not nightly" -rP tests/deploy

coverage: $(VENV)/dev.stamp  ## run `test-all` and report which lines ran, including those in child processes
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not deploy and not nightly and not long"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

lint: style types schemas site  ## check formatting, style, types, imports, the Dockerfile and GitHub's files
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

style: $(VENV)/dev.stamp  ## check only formatting and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp  ## check only types
	$(BIN)/mypy

# There is no schema for pre-commit's file; pre-commit checks it itself.
CHECK := $(BIN)/check-jsonschema --builtin-schema
schemas: $(VENV)/dev.stamp  ## check only GitHub's files, against their schemas
	$(CHECK) vendor.github-workflows .github/workflows/*.yml
	$(CHECK) vendor.dependabot .github/dependabot.yml
	$(CHECK) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(CHECK) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml

format: $(VENV)/dev.stamp  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench.stamp  ## compare with the raw engine, plain Flask and infinity (BENCH="--quick")
	$(BIN)/python -m benchmarks.run $(BENCH)

bench-host: $(VENV)/bench.stamp  ## measure the overhead of the service without the model (BENCH="--only one-32")
	$(BIN)/python -m benchmarks.host $(BENCH)

bench-device: $(VENV)/bench.stamp  ## measure how busy the service keeps a simulated accelerator
	$(BIN)/python -m benchmarks.simulated_device $(BENCH)

bench-gpu: $(VENV)/bench.stamp  ## run `bench` on CUDA
	$(BIN)/python -m benchmarks.run --device cuda $(BENCH)

PEER_ROWS := one paused one-8 one-32 32-4 mix beside-bulk
bench-peer: $(VENV)/bench.stamp  ## compare with any server (PEER="COMMAND --port {port}" or its URL; API=tei, openai or native)
	@test -n "$(PEER)" || { echo 'Set PEER to a command in which {port} is its port, or to the URL of a server.' >&2; exit 2; }
	$(BIN)/python -m benchmarks.run --systems service --only $(PEER_ROWS) --peer '$(PEER)' --api $(or $(API),tei) $(BENCH)

bench-open: $(VENV)/bench.stamp  ## requests that arrive at random, at 10 to 150 % of the capacity (PEER, API as above)
	$(BIN)/python -m benchmarks.open_loop $(if $(PEER),--peer '$(PEER)') --api $(or $(API),tei) $(BENCH)

bench-infinity:  ## install infinity-emb in its own virtual environment, for `bench`
	$(PYTHON) -m venv build/infinity-venv
	build/infinity-venv/bin/pip install -q --disable-pip-version-check -r benchmarks/requirements-peer.txt

release:  ## tag the current version, if the tree is clean and CHANGELOG.md has a section for it
	@version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' embedding_service/__init__.py); \
	fail() { echo "$$1" >&2; exit 1; }; \
	test -z "$$(git status --porcelain)" || fail "The working tree has changes; commit them first."; \
	grep -q "^## $$version (" CHANGELOG.md || fail "CHANGELOG.md has no section '## $$version (DATE)'."; \
	! git rev-parse -q --verify "refs/tags/v$$version" >/dev/null || fail "The tag v$$version exists already."; \
	git tag -a "v$$version" -m "Version $$version" && echo "Tagged. To publish: git push origin v$$version"

# REPOSITORY_URL, if set, becomes the package's address on PyPI.
dist: $(VENV)/dev.stamp  ## build the source distribution and the wheel into build/dist
	rm -rf build/dist build/dist-source
	mkdir -p build/dist build/dist-source
	git ls-files -z | xargs -0 cp --parents -t build/dist-source
	test -z "$(REPOSITORY_URL)" || printf '\n[project.urls]\nSource = "%s"\nChangelog = "%s"\nIssues = "%s"\n' \
		$(REPOSITORY_URL) $(REPOSITORY_URL)/blob/main/CHANGELOG.md $(REPOSITORY_URL)/issues >> build/dist-source/pyproject.toml
	cd build/dist-source && ../../$(BIN)/python -c 'from setuptools import build_meta as build; \
		build.build_sdist("../dist"); build.build_wheel("../dist")'

site: $(VENV)/dev.stamp  ## build the documentation into build/site; a broken link is an error
	$(BIN)/mkdocs build -q

audit: $(VENV)/serve.stamp  ## write build/sbom.json (CycloneDX) and check every pin for known vulnerabilities
	$(PYTHON) -m venv build/audit-venv
	build/audit-venv/bin/pip install -q --disable-pip-version-check -c constraints.txt pip
	build/audit-venv/bin/pip install -q --disable-pip-version-check --group audit
	build/audit-venv/bin/cyclonedx-py environment $(VENV) --output-file build/sbom.json
	build/audit-venv/bin/pip-audit --no-deps --disable-pip -r constraints.txt

# BUNDLE_PYTHON=3.12 targets a different Python version; BUNDLE="--without torch --weights float16" makes a smaller bundle.
bundle: $(VENV)/serve.stamp  ## pack everything for a machine without a network into build/bundle
	$(BIN)/python -m bundle.build $(if $(BUNDLE_PYTHON),--python $(BUNDLE_PYTHON)) $(BUNDLE)

docker:  ## build the image
	docker build -t embedding-service .

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# If the index of CPU builds cannot be reached, pip's own configuration decides.
$(VENV)/serve.stamp: requirements.txt constraints.txt | $(VENV)/bin/python
	@build=$(TORCH); \
	if [ $$build = auto ]; then [ -e /proc/driver/nvidia/version ] && build=cuda || build=cpu; fi; \
	if [ "$$(uname)" = Linux ] && [ $$build = cpu ] && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "Installing torch for CPUs (0.2 GB instead of 3 GB); for NVIDIA GPUs: make clean serve TORCH=cuda"; \
		$(INSTALL) -q --no-deps --retries 0 --timeout 10 --index-url $(TORCH_INDEX) torch || \
			echo "$(TORCH_INDEX) has no torch for this machine; pip installs the one that it finds."; \
	fi
	$(INSTALL) -r requirements.txt
	touch $@

# Groups need a newer pip than Python 3.11 brings.
$(VENV)/dev.stamp: $(VENV)/serve.stamp pyproject.toml
	$(INSTALL) pip
	$(INSTALL) --group dev
	touch $@

$(VENV)/bench.stamp: $(VENV)/serve.stamp pyproject.toml
	$(INSTALL) pip
	$(INSTALL) --group bench
	touch $@

$(VENV)/ray.stamp: $(VENV)/dev.stamp
	$(INSTALL) --group ray
	touch $@
