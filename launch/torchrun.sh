#!/usr/bin/env bash
# Trains with several ranks on this machine; launch/torchrun.sh --help says how. This script finds out how many ranks
# there are to be; launch/torchrun.py starts torchrun with the right flags, and ends as the run ended.
set -euo pipefail

# torchrun's agent would hand a closed descriptor to the first file or socket that it opens, and the ranks inherit it.
[ -e /dev/fd/0 ] || exec 0</dev/null
[ -e /dev/fd/1 ] || exec 1>/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null

refuse() { echo "$1" >&2 || true; exit 78; }
python=${PYTHON:-python}
command -v "$python" >/dev/null || refuse "error: $python: there is no such program; set PYTHON to one, like PYTHON=python3"
"$python" -c 'import sys; from importlib.util import find_spec as find; sys.exit(not (find("ddpm_dist") and find("torch")))' ||
    refuse "error: ddpm_dist is not installed for $python; in the checkout: pip install -e . (or make install)"
case ${NPROC:-1} in
    *[!0-9]* | 0*) refuse "error: NPROC=$NPROC: expected a number of ranks, like NPROC=2" ;;
esac
if [ -z "${NPROC:-}" ]; then
    gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # empty hides all of them
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    fi
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc would take these for the number of cores
    if [ "$gpus" -gt 0 ]; then NPROC=$gpus; else NPROC=$((cores < 4 ? cores : 4)); fi
    # The ranks must divide the logical shards, which are 8 by default: 1, 2, 4 and 8 do.
    for n in 8 4 2 1; do if [ "$NPROC" -ge "$n" ]; then NPROC=$n; break; fi; done
fi

# torchrun would set this variable and warn of it; the trainer sets its own thread count (train.threads).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The ranks get the signals of a scheduler too, and have so many seconds to save.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
exec "$python" "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/torchrun.py" "$NPROC" "$0" "$@"
