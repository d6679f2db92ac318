.PHONY: help check test suite lint format

help:
	@echo "make check   all that has to pass, in a new environment: .ci/run"
	@echo "make test    the tests, on all cores"
	@echo "make suite   transformers' own common tests of models and processors, on our classes"
	@echo "make lint    ruff, as .ci/run calls it"
	@echo "make format  let ruff mend what it can"

check:
	.ci/run

test:
	pytest -n auto --dist loadfile

suite:
	tests=$$(python tests/transformers_suite/fetch.py outputs) && TRANSFORMERS_TESTS=$$tests pytest -n auto --dist loadscope tests/transformers_suite

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .
