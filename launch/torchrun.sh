#!/usr/bin/env bash
# The right torchrun flags in one place: launch/torchrun.sh [ARGUMENTS OF ddpm_dist.train]
# One rank per GPU; without GPUs one per core, at most 4. NPROC=n says otherwise. PYTHON=... picks the interpreter.
set -euo pipefail

# torchrun's agent would hand a closed descriptor to the first file or socket that it opens, and the ranks inherit it.
[ -e /dev/fd/0 ] || exec 0</dev/null
[ -e /dev/fd/1 ] || exec 1>/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null

python=${PYTHON:-python}
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ddpm_dist") is None)'; then
    echo "error: ddpm_dist is not installed for $python; in the checkout: pip install -e . (or make install)" >&2 || true
    exit 78
fi
if [ -z "${NPROC:-}" ]; then
    gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # empty hides all of them
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    fi
    cores=$(nproc)
    if [ "$gpus" -gt 0 ]; then NPROC=$gpus; else NPROC=$((cores < 4 ? cores : 4)); fi
    # The ranks must divide the logical shards, which are 8 by default: 1, 2, 4 and 8 do.
    for n in 8 4 2 1; do if [ "$NPROC" -ge "$n" ]; then NPROC=$n; break; fi; done
fi

# torchrun would set this variable and warn of it; the trainer sets its own thread count (train.threads).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The agent passes the signals of a scheduler on to the workers, and leaves them so many seconds to save.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
# --standalone finds a free port, so that two runs on one machine do not clash.
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m ddpm_dist.train "$@"
