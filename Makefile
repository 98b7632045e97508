# make demo      everything once, on a CPU, without downloads
# make test      the test suite; make test-slow adds what takes minutes
# make lint      ruff, as continuous integration runs it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-slow lint clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/python examples/make_digit_shards.py --output_dir runs/demo/digits
	OMP_NUM_THREADS=1 $(BIN)/python examples/pretrain_small_clip.py --train_data runs/demo/digits --output_dir runs/demo/base \
	  --hidden_size 64 --flip false --crop_padding 2 --batch_size 32 --epochs 6
	$(BIN)/python benchmarks/compare_methods.py --model runs/demo/base --data runs/demo/digits --output_dir runs/demo/compare \
	  --eps 16 --rho 0.1 --steps 40 --curve_steps 5 --eval_eps 4 8 16 --num_samples 360 --jobs 2

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs
