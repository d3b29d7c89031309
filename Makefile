# The one task runner. `make` alone lists what there is.
SHELL := /bin/bash
UV = $$(. ./activate && echo "$$GPUYARD_CACHE")/uv-$$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements/bootstrap.txt)/bin/uv
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock-python" $(UV) pip compile --quiet --generate-hashes --no-emit-index-url
# What is left out: nothing but text is served, and these want a torch with a GPU behind it.
TEXT_ONLY = --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
# The nodes' own Python, and the oldest C library among the nodes we write for (Ubuntu 22.04 has 2.35, Debian 12 has 2.36).
NODES = --python-version 3.11 --python-platform x86_64-manylinux_2_34
ANYWHERE = --python-version 3.9 --universal

# The steps of set-up that a fleet of the lab needs: nothing for tests, nothing for QEMU.
LAB = venv pulumi nvml locked-engines engine-sim model

.DEFAULT_GOAL := help
.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: setup
setup: ## install all that is needed, or see that it is there
	@tools/setup

.PHONY: lab
lab: ## bring the lab fleet up, converge it, ask its model a question, show its status
	@tools/setup $(LAB) # and what these need
	@. ./activate && gpuyard lab up

.PHONY: lab-down
lab-down: ## remove the lab fleet and all that it left on this machine
	@. ./activate && gpuyard lab down

.PHONY: test
test: ## set up, run every test this machine can run, list what was not run and why
	@tools/setup $(LAB) haproxy browser || [ $$? = 3 ] # 3: no root here, so the lab's parts are listed as not run
	@. ./activate && python tools/test.py

.PHONY: lint
lint: ## formatting, types, import contracts, Ansible's rules
	@tools/setup venv
	@. ./activate && python tools/test.py lint

.PHONY: test-unit
test-unit: ## the tests that need nothing but Python
	@tools/setup venv
	@. ./activate && python tools/test.py unit

.PHONY: test-engine
test-engine: ## the tests with the real Pulumi engine
	@tools/setup venv pulumi
	@. ./activate && python tools/test.py engine

.PHONY: test-lab
test-lab: setup ## the tests on the lab's machines
	@. ./activate && python tools/test.py lab

.PHONY: test-relock
test-relock: setup ## a running fleet on another driver branch and another version of the real engine; a quarter of an hour
	@. ./activate && python tools/test.py relock

.PHONY: test-contract
test-contract: setup ## the simulated engine and the real vLLM, asked the same
	@. ./activate && python tools/test.py contract

.PHONY: test-qemu
test-qemu: ## the tests that need a kernel of their own, in QEMU
	@tools/setup venv qemu vm
	@. ./activate && python tools/test.py qemu

.PHONY: molecule
molecule: setup ## every molecule scenario
	@. ./activate && python tools/test.py molecule

.PHONY: combinations
combinations: ## what people saw work and fail, and how the rules judge each
	@tools/setup venv
	@. ./activate && gpuyard compat --table tests/plan/combinations.yaml

MUTANTS = .gpuyard/mutants

.PHONY: mutate
mutate: ## change the rules' conditions one by one and see that a test fails each time; takes half an hour and more
	@tools/setup venv
	@rm -rf $(MUTANTS) && mkdir -p $(MUTANTS) && cp -r pyproject.toml src tests $(MUTANTS) # a copy: it writes into the sources
	@. ./activate && cd $(MUTANTS) && export PYTHONPATH="$$PWD/src" && cosmic-ray init pyproject.toml session.sqlite && \
	  cr-filter-operators session.sqlite pyproject.toml >/dev/null 2>&1 && cosmic-ray exec pyproject.toml session.sqlite && \
	  cr-report --surviving-only --show-diff session.sqlite

.PHONY: aws-rehearsal
aws-rehearsal: FLEETS =
aws-rehearsal: ## bring the fleets of AWS up, scale and destroy them on an emulated account, and compare it card by card
	@tools/setup venv pulumi
	@. ./activate && python tools/aws_rehearsal.py $(FLEETS)

.PHONY: aws-kills
aws-kills: KILLS = 5
aws-kills: ## kill `pulumi up` of a fleet on an emulated account KILLS times at random moments, and let the next one go on
	@tools/setup venv pulumi
	@. ./activate && python tools/aws_kills.py --kills $(KILLS)

.PHONY: aws-previews
aws-previews: ## write anew what `pulumi preview` says of each fleet of AWS, for review
	@tools/setup venv pulumi
	@. ./activate && python tools/aws_previews.py

.PHONY: bench-provision
bench-provision: ## engine time and bytes of state for 10, 100 and 1,000 resources on AWS, beside a bare program of the same
	@tools/setup venv pulumi
	@. ./activate && python tools/bench_provision.py

.PHONY: bench-kill
bench-kill: setup ## kill a converge ten times and see that the next one comes to the same state
	@. ./activate && python tools/bench_kill.py

.PHONY: bench-drain
bench-drain: setup ## restart all engines under load, with and without a drain, and print what each loses
	@. ./activate && gpuyard lab up --stack drill && python tools/bench_drain.py

.PHONY: bench-upgrade
bench-upgrade: RUNS = 3
bench-upgrade: ## upgrade a loaded fleet's driver and roll it back RUNS times, and once without a drain, and print what each costs; REAL=1 with real engines
	@tools/setup $(LAB)
	@. ./activate && python tools/bench_upgrade.py --runs $(RUNS) $(if $(REAL),--real)

.PHONY: bench-faults
bench-faults: setup ## break a node in each way while its driver is upgraded under load; then break and mend everything ten times
	@. ./activate && python tools/bench_upgrade_faults.py
	@. ./activate && GPUYARD_FAULT_ROUNDS=10 pytest -q -s -m lab tests/lab/test_faults_on_a_node.py -k each_fault

.PHONY: bench-resume
bench-resume: RUNS ?= 10000
bench-resume: ## try RUNS random histories of crashes in the model of a fleet, and print what was in them
	@tools/setup venv
	@. ./activate && GPUYARD_HISTORIES=$(RUNS) pytest -q -s tests/upgrade/test_histories.py

.PHONY: bench-crashes
bench-crashes: CASES = 0
bench-crashes: ## break off a driver upgrade in every state and every way, or in CASES of them, and see that the same command ends it
	@tools/setup $(LAB)
	@. ./activate && python tools/bench_upgrade_crashes.py --sample $(CASES)

.PHONY: bench-answers
bench-answers: RUNS = 200
bench-answers: setup ## ask the answer gate RUNS times of engines that did not change, under other users' load: no alarm may be raised
	@. ./activate && GPUYARD_ANSWER_ROUNDS=$(RUNS) pytest -q -s tests/contract/test_answer_gate.py

.PHONY: bench-lock
bench-lock: ## lock 1,000 nodes and 50 models, beside the lab's fleet: time and memory
	@tools/setup venv
	@. ./activate && python tools/bench_lock.py

.PHONY: bench-plan
bench-plan: ## plan 1,000 nodes and 50 models with other machines considered: time and memory
	@tools/setup venv
	@. ./activate && python tools/bench_plan.py

.PHONY: bench-fit
bench-fit: SPECS = 10000
bench-fit: ## hold `gpuyard fit` against the planners of four vLLMs on SPECS random models, and beside other calculators
	@tools/setup venv locked-engines
	@. ./activate && nice python tools/bench_fit.py --specs $(SPECS)

.PHONY: bench-fit-starts
bench-fit-starts: ## start six tiny models with random weights under the locked vLLM on the CPU, and compare the tokens it prints
	@tools/setup venv locked-engines
	@. ./activate && nice python tools/bench_fit_starts.py

.PHONY: lock-python
lock-python: ## write requirements/*.txt anew from their .in files and pyproject.toml
	@tools/setup uv
	$(COMPILE) $(ANYWHERE) requirements/bootstrap.in -o requirements/bootstrap.txt
	$(COMPILE) $(ANYWHERE) --no-deps requirements/go.in -o requirements/go.txt
	$(COMPILE) --python-version 3.12 --universal pyproject.toml requirements/build.in --group dev -o requirements/control.txt
	for engine in engine-cpu engine-cpu-0.31; do \
	  $(COMPILE) $(NODES) requirements/$$engine.in --override requirements/engine-cpu.overrides $(TEXT_ONLY) \
	    -o requirements/$$engine.txt || exit; \
	done
	$(COMPILE) $(NODES) requirements/engine-cuda.in -o requirements/engine-cuda.txt
	$(COMPILE) $(NODES) --no-deps requirements/model-tools.in -o requirements/model-tools.txt
	@$(MAKE) lock-engine-sim

.PHONY: lock-engine-sim
lock-engine-sim: ## pin the simulated engine as its source is now, in its requirements and in the locks of its fleets
	@tools/setup venv
	@. ./activate && python tools/make_engine_wheel.py --requirements requirements/engine-sim.txt
	@. ./activate && for fleet in $$(grep -l '^ *distribution: vllm-sim' fleets/*.yaml | grep -v lock); do gpuyard lock $$fleet; done

.PHONY: clean
clean: ## remove what can be made again from this clone; the fleet's state and the cache stay
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis .ansible dist
	find . -name __pycache__ -type d -not -path './.gpuyard/*' -prune -exec rm -rf {} +
