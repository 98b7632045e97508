# make demo      everything once, on a CPU, without downloads: LORE beside FARE, then preference optimisation
# make results-quick   every table and figure of docs/results.md in small: digits, one seed, no download
# make test      the test suite, in JOBS=2 processes of one thread; make test-slow runs what takes minutes
# make lint      ruff and mypy, as continuous integration runs it

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo demo-lore demo-preferences results-quick test test-slow lint clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: demo-lore demo-preferences

demo-lore: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/python examples/make_digit_shards.py --output_dir runs/demo/digits
	OMP_NUM_THREADS=1 $(BIN)/python examples/pretrain_small_clip.py --train_data runs/demo/digits --output_dir runs/demo/base \
	  --hidden_size 64 --flip false --crop_padding 2 --batch_size 32 --epochs 6
	$(BIN)/python benchmarks/compare_methods.py --model runs/demo/base --data runs/demo/digits --output_dir runs/demo/compare \
	  --eps 16 --rho 0.1 --steps 40 --curve_steps 5 --eval_eps 4 8 16 --num_samples 360 --jobs 2
	cp runs/demo/compare/eval-compare/report.html runs/demo/report.html

# The small CLIP that can read comes with the repository: examples/reading_clip/README.md has the command that makes it.
WORDS := --word_kind label --word_place bottom --word_size_min 40 --word_size_max 60

demo-preferences: $(VENV)/.installed
	rm -rf runs/demo/attributes runs/demo/preferences runs/demo/head runs/demo/dial
	$(BIN)/python examples/make_attribute_shards.py --output_dir runs/demo/attributes
	$(BIN)/python benchmarks/compare_preferences.py --model examples/reading_clip --data runs/demo/attributes \
	  --output_dir runs/demo/preferences --preferences ce dpo kto --beta 1 0.5 1.5 --steps 100 $(WORDS) \
	  --eval_word_place bottom --jobs 2
	$(BIN)/accelerate launch --quiet --num_cpu_threads_per_process 2 --config_file accelerate_configs/cpu.yaml \
	  train_po.py --model_name_or_path examples/reading_clip \
	  --task pairs --trainable head --train_shards runs/demo/attributes/pairs/train --eval_shards runs/demo/attributes/pairs/val \
	  --beta 0.05 --learning_rate 1e-2 --epochs 10 --logging_steps 40 --report_to none --output_dir runs/demo/head
	$(BIN)/accelerate launch --quiet --num_cpu_threads_per_process 2 --config_file accelerate_configs/cpu.yaml \
	  evaluate.py --model runs/demo/head \
	  --data runs/demo/attributes/pairs runs/demo/attributes --measure head_t fairness --top_k 20 $(WORDS) \
	  --query "a photo of the red digit seven." "a photo of the digit seven." --output_dir runs/demo/dial

results-quick: $(VENV)/.installed
	$(BIN)/python benchmarks/results_quick.py --output_dir runs/results-quick

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
