# make demo: train, choose thresholds, test and localize. make test: the tests but the slow ones. make test-all: all of
# them. make lint: ruff and mypy. make results: the demo, and its figures into README.md. Each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The network and the recipe of the demo: small enough for two cores and five minutes.
DEMO := --exp_name demo --htsat_size tiny --batch_size 16 \
	--max_epoch 16 --lr_scheduler_epoch 10,13,16 --lr_rate 0.02,0.1,0.2 --spec_augment False
RUN := workspace/runs/demo

.PHONY: demo results test test-all lint install install-dev clean
.DELETE_ON_ERROR:

demo: install
	@[ -f workspace/data/demo/demo.h5 ] || $(BIN)/python main.py prepare --dataset_type demo
	@$(BIN)/python main.py train $(DEMO) --resume auto
	@$(BIN)/python main.py calibrate --resume_checkpoint $(RUN)/checkpoints/best.ckpt --calibrate_for collar_f1
	@$(BIN)/python main.py test --resume_checkpoint $(RUN)/checkpoints/best.ckpt --fl_local True
	@$(BIN)/python fl_evaluate.py --exp_name demo --report
	@echo
	@echo "Checkpoints: $(RUN)/checkpoints   Metrics: $(RUN)/scores/test.json, test_detection.json"
	@echo "Report, for a browser: $(RUN)/scores/test_report.html   Curves: $(BIN)/tensorboard --logdir $(RUN)/logs"
	@echo "Your own recordings: $(BIN)/python main.py predict FILES --resume_checkpoint $(RUN)/checkpoints/best.ckpt"

results: demo
	@$(BIN)/python benchmarks/demo.py

test: install-dev
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: install-dev
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: install-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy .

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

# setuptools comes with Python 3.10 and 3.11, in versions with known holes: the one of constraints.txt replaces it.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) && $@ -m pip install --upgrade setuptools -c constraints.txt

# sed_scores_eval comes as source with a C++ extension. Where there is no compiler, one is taken from PyPI.
$(VENV)/installed: requirements.txt constraints.txt | $(BIN)/python
	@if ! command -v c++ > /dev/null; then \
		$(BIN)/pip install ziglang && zig=$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages/ziglang/zig) && \
		export CC="$$zig cc" CXX="$$zig c++"; \
	fi; $(BIN)/pip install -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt constraints.txt $(VENV)/installed
	@$(BIN)/pip install -r requirements-dev.txt -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
