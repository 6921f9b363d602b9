# make demo and make test need only Python and g++: they create .venv, install the pinned requirements, build and run.
#
#   PYTHON=python3.12     the Python that .venv is made from
#   VENV=0                no .venv and nothing installed: PYTHON has torch and the rest already, and builds in place
#   TORCH="..."           what to give to pip for torch, such as TORCH="torch==2.13.0 --index-url URL-OF-CPU-WHEELS" or a wheel
#   ARGS="..."            further words for the program that is run: make test ARGS="-k lstm", make demo ARGS="--epochs 5"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= -r requirements-torch.txt
ARGS ?=

ifeq ($(VENV),0)
  RUN := $(PYTHON)
  READY :=
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/installed
  # There they are installed, and their tests must not be skipped.
  export FUSEDRNN_CLIENTS := 1
endif

.PHONY: help build demo examples test bench gpu info docs clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a digit classifier with torch.nn.LSTM and with fusedrnn.LSTM, and compare them"
	@echo "make examples  every program of examples/, about 6 minutes"
	@echo "make test    run the tests"
	@echo "make bench   measure against torch.nn on this machine's CPU"
	@echo "make gpu     on a machine with a GPU: build, test, sanitize and measure the CUDA kernels, in 9 minutes"
	@echo "make docs    write the reference of the API to build/docs"
	@echo "make info    say what was built and what this machine can do"
	@echo "make build   compile what has changed"
	@echo "make clean   remove what was built; make distclean removes $(VENV) too"
	@sed -n '3,/^$$/s/^#  /  /p' Makefile

build: $(READY)
	$(RUN) setup.py -q build_ext --inplace

demo: build
	$(RUN) -m examples.digits $(ARGS)

examples: build
	$(RUN) -m examples $(ARGS)

test: build
	$(RUN) -m pytest tests $(ARGS)

bench: build
	$(RUN) -m benchmarks.run --suite cpu $(ARGS)

gpu: $(READY)
	$(RUN) -m benchmarks.gpu $(ARGS)

info: build
	$(RUN) -m fusedrnn.info

docs: build
	$(RUN) -W error -m pdoc --docformat google --no-include-undocumented --no-show-source -o build/docs \
	    fusedrnn '!fusedrnn[.]' $(patsubst fusedrnn/%.py,fusedrnn.%,$(wildcard fusedrnn/[a-z]*.py))

# The stamp: a second make installs nothing. Torch comes first, so that no other package chooses one.
$(VENV)/installed: requirements.txt requirements-torch.txt requirements-clients.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(TORCH)
	$(RUN) -m pip install -r requirements.txt
	$(RUN) -m pip install -r requirements-clients.txt -c requirements.txt
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist *.egg-info fusedrnn/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
