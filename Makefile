# make demo and make test need Python >= 3.10, git and make; everything else is installed into .venv.
PYTHON ?= python3
LOWEST_PYTHON ?= $(PYTHON)
BIN := .venv/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check
PICTURE := demo/tinysd_gdf.png

.PHONY: demo test test-fast fuzz test-lowest lint cards check bench clean

demo: .venv/installed                  ## the maps of tinysd as colours, beside the photograph
	@mkdir -p $(dir $(PICTURE))
	@$(BIN)/diffusion-backbones visualize tinysd_gdf docs/cat.jpg -o $(PICTURE)

test: .venv/installed-dev              ## the whole suite; make test ARGS="-k cards" for a part of it
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

FAST := activations bad_input chunks house image_encoders import_hook inputs old_pickles plan unchanged
test-fast: .venv/installed-dev         ## the inner loop: every registered name on meta, what must not change, the house rules
	$(BIN)/python -m pytest -n 2 $(FAST:%=tests/test_%.py) $(ARGS)

fuzz: .venv/installed-dev             ## six times the generated bad inputs that the suite draws; make fuzz FUZZ=20 for more
	FUZZ=$(or $(FUZZ),6) $(BIN)/python -m pytest -n 2 tests/test_fuzz.py -rP $(ARGS)

test-lowest: .venv-lowest/installed    ## the same at the lowest versions that pyproject.toml promises, with LOWEST_PYTHON
	.venv-lowest/bin/python -m pytest -n 2 -m "not newer" $(FAST:%=tests/test_%.py) $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

cards: .venv/installed-dev             ## write the model cards, the README's tables and costs.json anew
	$(BIN)/python scripts/generate.py

check: .venv/installed-dev             ## exit 1 if one of them is not current
	$(BIN)/python scripts/generate.py --check

bench: .venv/installed-dev
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf .venv .venv-lowest demo build dist *.egg-info

# The stamps are older than pyproject.toml when dependencies may have changed.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, not " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time this fetches PyTorch, several gigabytes." >&2
	@$(BIN)/python -m $(PIP_INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/python -m $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

.venv-lowest/installed: pyproject.toml scripts/lowest.py .venv/installed-dev
	@test -x .venv-lowest/bin/python || $(LOWEST_PYTHON) -m venv .venv-lowest
	@$(BIN)/python scripts/lowest.py > .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m $(PIP_INSTALL) --requirement .venv-lowest/lowest.txt pytest pytest-xdist
	@touch $@
