# Two commands do everything: `make demo` (data, training, pictures) and `make test`.
# Both create .venv on first use; PYTHON may name another interpreter (>= 3.10).

PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/installed

.PHONY: demo test install clean

demo: $(INSTALLED)
	$(BIN)/python tools/make_shapes.py data/shapes --split train --num 20000
	$(BIN)/python train.py configs/shapes/pretrain.yaml
	$(BIN)/python sample.py runs/shapes-pretrain --prompts-file configs/shapes/prompts.txt --out outputs/demo
	@echo "The pictures are in outputs/demo (open outputs/demo/grid.png); training's grids are in runs/shapes-pretrain/samples."

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow" tests

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is %s; name another with make PYTHON=..." % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,eval,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
