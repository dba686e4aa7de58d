#!/bin/bash

# Parameters
#SBATCH --account=me
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=1
#SBATCH --exclude=node3
#SBATCH --gpus-per-node=4
#SBATCH --job-name=quickstart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=<PROJECT>/runs/.submitit/quickstart/%j/%j_0_log.out
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=mine
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
module load cuda
set +e  # the exit code of srun is judged at the end
export PYTHONPATH=<PROJECT>${PYTHONPATH:+:$PYTHONPATH}
source <PROJECT>/slurm/lifecycle.sh
requeue=<PROJECT>/slurm/requeue.sh
runs=(<PROJECT>/runs/quickstart)
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
agains=('cd <PROJECT> && <PYTHON> -m launch.submit --config=<PROJECT>/configs/quickstart.yaml --nodes=2 --gpus-per-node=4 --tasks-per-node=4 --cpus-per-task=1 --time=1440 --total-time=10080 --max-requeues=1000 --signal-lead=120 --account=me --qos=long --constraint=a100 --exclude=node3 '"'"'--python=apptainer exec --nv image.sif python'"'"' --sbatch=reservation=mine '"'"'--setup=module load cuda'"'"'')
again=${agains[${SLURM_ARRAY_TASK_ID:-0}]}
export MAX_REQUEUES=1000 TOTAL_MINUTES=10080
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
srun --unbuffered --output <PROJECT>/runs/.submitit/quickstart/%j/%j_%t_log.out --cpus-per-task=1 --export=ALL --wait=180 apptainer exec --nv image.sif python -u -m submitit.core._submit <PROJECT>/runs/.submitit/quickstart/%j


# teardown
exec bash "$requeue" end "$run" "$?" bash -c "$again"
