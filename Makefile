# `make demo` and `make test` set up their own environment in .venv; nothing else needs to be done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint tables wheel weights-wheel clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/poolskip demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# mypy sees the packages where the wheel puts them: registry/ is poolskip_zoo.registry there.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build && $(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml poolskip_zoo

tables: $(VENV)/installed
	$(BIN)/python docs/make_tables.py

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel

# hub_cards/ as the package poolskip_zoo_weights.
weights-wheel: $(VENV)/installed
	rm -rf build/weights && mkdir -p build/weights
	cp -R hub_cards build/weights/poolskip_zoo_weights
	mv build/weights/poolskip_zoo_weights/pyproject.toml build/weights/
	$(BIN)/python -m build --wheel --outdir dist build/weights

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info
