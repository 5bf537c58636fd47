# `make demo` and `make test` set up their own environment in .venv; nothing else needs to be done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10) and \
	"Python %d.%d is too old: 3.10 or later is needed, as in `make PYTHON=python3.12 demo`" % sys.version_info[:2])

.PHONY: demo test lint tables wheel weights-wheel clean

# A .venv whose Python is too old, or gone, would stay so: it is made anew.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	@$(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/poolskip demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# mypy sees the packages where the wheel puts them: registry/ is poolskip_zoo.registry there. Then a user's program.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml poolskip_zoo
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --strict --follow-imports silent \
		../../tests/test_typed_program.py

tables: $(VENV)/installed
	$(BIN)/python docs/make_tables.py

# By way of the sdist, which has none of what an earlier build left in build/.
wheel: $(VENV)/installed
	$(BIN)/python -m build

# hub_cards/ as the package poolskip_zoo_weights.
weights-wheel: $(VENV)/installed
	rm -rf build/weights && mkdir -p build/weights
	cp -R hub_cards build/weights/poolskip_zoo_weights
	mv build/weights/poolskip_zoo_weights/pyproject.toml build/weights/
	cp LICENSE NOTICE build/weights/
	$(BIN)/python -m build --wheel --outdir dist build/weights

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info
