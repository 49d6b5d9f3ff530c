# Everything starts here; the logic is in tools/setup.sh. ARGS goes on to the command: make test ARGS="-k align".
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

python := .venv/bin/python

help:
	@echo 'make demo    train six learning rules at three widths on handwritten digits; table and report.html'
	@echo 'make test    run the whole test suite'
	@echo 'make setup   only make .venv, with everything that demo and test need'
	@echo 'make lint    check style and types'
	@echo 'make clean   remove .venv and all caches; runs/ stays'
	@echo
	@echo 'ARGS="..." goes on to the command: make demo ARGS="epochs=1", make test ARGS="-k align"'
	@echo 'PYTHON=... chooses the interpreter (3.11 or 3.12)'

setup:
	@tools/setup.sh all

demo:
	@tools/setup.sh base
	$(python) launch/compare.py experiment=demo $(ARGS)

test: # by three workers, as tests wait for processes and files more than two cores are busy
	@tools/setup.sh all
	@$(python) -m compileall -q alignscale launch tools tests # once, and not in each process that a test starts
	$(python) -m pytest -n 3 $(ARGS)

lint:
	@tools/setup.sh all
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

clean:
	rm -rf .venv .cache build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
