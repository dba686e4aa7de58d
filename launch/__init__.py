"""Before a run: submit it (submit), see whether it can work (doctor), try it on a SLURM of your own (local_cluster)."""
