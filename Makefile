# Everything a fresh machine needs is Python >= 3.10 and make: each target creates .venv/ first when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Where it is set, as in many containers, each process of the tests would compile the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-machines kernels new-user lint check typed gate reports clean

demo: $(STAMP)
	$(BIN)/python -m qwen_eval

# Three for two cores: one often waits, for a server, a limit of time or a process that it has killed. Each begins with a
# third of the files and takes from the others' at the end, so that what a file's tests share, such as Ray, is made once.
WORKERS := 3
SHARED := -n $(WORKERS) --dist worksteal

test: $(STAMP)
	$(BIN)/python -m pytest $(SHARED)

# The numerics as other CPUs compute them: AVX2 without bf16 units asked for bf16; then fp32, as a CPU without bf16
# units computes by default, unless this is one. About two minutes of two cores.
NUMERICS := $(addprefix tests/test_,$(addsuffix .py,dense bnb gptq kv_quant quantized_models model_golden \
	positions_golden generation_golden choice_logits native_engine windows long_ppl long_context engines_contract \
	non_finite evaluate planted needle))

test-machines: $(STAMP)
	ATEN_CPU_CAPABILITY=avx2 QWEN_EVAL_CPU_DTYPE=bf16 $(BIN)/python -m pytest $(SHARED) $(NUMERICS)
	if $(BIN)/python -c "import sys; from qwen_eval.models.quant.kernels import dense_dtype as d; sys.exit('32' in str(d()))"; \
	then QWEN_EVAL_CPU_DTYPE=fp32 $(BIN)/python -m pytest $(SHARED) $(NUMERICS); fi

# The kernels of GPUs on a machine without one: what they compute, in Triton's interpreter, and that they compile for
# A100 and H100. Installs triton (a gigabyte); about two minutes of two cores.
kernels: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev,kernels]
	$(BIN)/python -m pytest -n 2 tests/test_gpu_kernels.py
	$(BIN)/python tools/compile_kernels.py --models qwen-7b,qwen2.5-7b,qwen3-8b --dtypes bfloat16

# docs/first_hour.md, word by word, with the wheel in an empty environment: about three minutes.
new-user: $(STAMP)
	$(BIN)/python tools/new_user.py --python $(PYTHON)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint
	$(BIN)/mypy

# check as CI runs it: fewer typed expressions than this are an error. mypy's report leaves its cache unused: a minute.
TYPED_PERCENT := 98
typed: lint
	$(BIN)/mypy --any-exprs-report .mypy_report
	@awk '/^ *Total/ { print "typed expressions: " $$4; exit $$4 + 0 < $(TYPED_PERCENT) }' .mypy_report/any-exprs.txt

# The embedded miniature against reports/baselines: a minute. After a change that is meant: make reports, look, commit.
gate: $(STAMP)
	$(BIN)/python tools/make_reports.py --gate

# reports/ and its baselines anew, from conf/reports.yaml.
reports: $(STAMP)
	$(BIN)/python tools/make_reports.py

# torch first and pinned: without the pin pip takes a build with gigabytes of CUDA packages on a machine that has no GPU.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .mypy_report .ruff_cache .pytest_cache
