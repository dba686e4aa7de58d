#!/bin/bash

# Parameters
#SBATCH --array=0-3%2
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=1
#SBATCH --job-name=quickstart
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=<PROJECT>/runs/.submitit/quickstart/%A_%a/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120

# setup
set +e  # the exit code of srun is judged at the end
export PYTHONPATH=<PROJECT>${PYTHONPATH:+:$PYTHONPATH}
source <PROJECT>/slurm/lifecycle.sh
requeue=<PROJECT>/slurm/requeue.sh
runs=(<PROJECT>/runs/quickstart-lr=1e-4-seed=0 <PROJECT>/runs/quickstart-lr=1e-4-seed=1 <PROJECT>/runs/quickstart-lr=2e-4-seed=0 <PROJECT>/runs/quickstart-lr=2e-4-seed=1)
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
agains=('cd <PROJECT> && <PYTHON> -m launch.submit --config=<PROJECT>/configs/quickstart.yaml --nodes=1 --gpus-per-node=1 --tasks-per-node=1 --cpus-per-task=1 --max-requeues=1000 --signal-lead=120 optim.lr=1e-4 run.seed=0 run.name=quickstart-lr=1e-4-seed=0' 'cd <PROJECT> && <PYTHON> -m launch.submit --config=<PROJECT>/configs/quickstart.yaml --nodes=1 --gpus-per-node=1 --tasks-per-node=1 --cpus-per-task=1 --max-requeues=1000 --signal-lead=120 optim.lr=1e-4 run.seed=1 run.name=quickstart-lr=1e-4-seed=1' 'cd <PROJECT> && <PYTHON> -m launch.submit --config=<PROJECT>/configs/quickstart.yaml --nodes=1 --gpus-per-node=1 --tasks-per-node=1 --cpus-per-task=1 --max-requeues=1000 --signal-lead=120 optim.lr=2e-4 run.seed=0 run.name=quickstart-lr=2e-4-seed=0' 'cd <PROJECT> && <PYTHON> -m launch.submit --config=<PROJECT>/configs/quickstart.yaml --nodes=1 --gpus-per-node=1 --tasks-per-node=1 --cpus-per-task=1 --max-requeues=1000 --signal-lead=120 optim.lr=2e-4 run.seed=1 run.name=quickstart-lr=2e-4-seed=1')
again=${agains[${SLURM_ARRAY_TASK_ID:-0}]}
export MAX_REQUEUES=1000 TOTAL_MINUTES=0
export DDPM_EXIT_CODE_FILE=$(mktemp) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap : INT HUP USR1 USR2  # the tasks stop at them; this shell waits for the tasks
trap 'bash "$requeue" told "$run"' TERM
srun() {
    command srun "$@" &
    wait_through_signals $!
}
bash "$requeue" begin "$run" || exit

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output <PROJECT>/runs/.submitit/quickstart/%A_%a/%A_%a_%t_log.out --cpus-per-task=1 --export=ALL --wait=180 <PYTHON> -u -m submitit.core._submit <PROJECT>/runs/.submitit/quickstart/%j


# teardown
exec bash "$requeue" end "$run" "$?" bash -c "$again"
