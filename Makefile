# Every target leaves .venv with what README's commands, the tests and the eval binary need.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow lint setup clean

demo: .venv/.ready
	$(PY) -m demo.run

test: .venv/.ready
	$(PY) -m pytest -q -m "not slow"

test-slow: .venv/.ready
	$(PY) -m pytest -q -m slow

lint: .venv/.ready
	$(PY) -m ruff check .
	$(PY) -m mypy jaxsft

setup: .venv/.ready

# torch is an oracle of the tests alone. It comes first: a package that depends on it would choose a version of its own.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("error: found Python %d.%d; wanted 3.11 or newer; set PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test,eval]'
	touch $@

clean:
	rm -rf .venv runs .cache build dist *.egg-info
