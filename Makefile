# make demo   trains teacher, baseline and student on drawn X-rays and prints the table
# make test   runs the tests
#
# Both first create .venv and install requirements.txt there. This is repeated only if
# requirements.txt changes. Another Python: make demo PYTHON=python3.12
PYTHON = python3
RUN = .venv/bin/python

.PHONY: demo test
demo: .venv/ready
	$(RUN) train.py --role teacher
	$(RUN) train.py --role baseline
	$(RUN) train.py --role student --T 1
	$(RUN) evaluate.py runs/demo
test: .venv/ready
	$(RUN) -m pytest -q
.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else '$(PYTHON) is \
	too old. Python 3.11 or later is needed: make demo PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -r requirements.txt
	touch $@
