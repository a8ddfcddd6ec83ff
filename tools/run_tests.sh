#!/usr/bin/env bash
# Run the test suite from a bare clone; arguments go to pytest: bash tools/run_tests.sh tests/losses -k gspo
# Files are dealt to one process per core, at most 8; -n 0 runs all in one. The suite is the CPU's; where there is a
# GPU, the tests marked gpu follow on it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh

# Without kept byte code every interpreter that a test starts would compile torch and transformers again.
unset PYTHONDONTWRITEBYTECODE
# Tests fork several ranks on few cores, and nothing may reach for the network.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
workers=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)  # nproc would answer OMP_NUM_THREADS
CUDA_VISIBLE_DEVICES="" .venv/bin/python -m pytest -n $((workers < 8 ? workers : 8)) --dist loadfile "$@"
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    .venv/bin/python -m pytest -m gpu "$@" || [ $? -eq 5 ]  # 5: no test of these is marked gpu
fi
