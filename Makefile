.PHONY: help check test lint format

help:
	@echo "make check   all that has to pass, in a new environment: .ci/run"
	@echo "make test    the tests, on all cores"
	@echo "make lint    ruff, as .ci/run calls it"
	@echo "make format  let ruff mend what it can"

check:
	.ci/run

test:
	pytest -n auto --dist loadfile

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .
