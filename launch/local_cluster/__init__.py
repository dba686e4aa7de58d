"""A real SLURM of several nodes on one machine, thrown away afterwards: `slurm/local-cluster` is its command.

It runs with any Python from 3.9 on, without being installed: everything here imports the standard library alone.

command.py        the command line
cluster.py        a cluster from `up` to `down`: crash, restore, status
description.py    what is known of a cluster: options.py (of `up`), identity.py (names, addresses, ports), its files
daemons.py        starts munged, slurmdbd, slurmctld and the nodes
configuration.py  writes slurm.conf and the files beside it;  hosts.py: host names
network.py        network namespaces;  freezer.py: the cgroups in which SLURM keeps a job's processes
processes.py      starts, finds and ends processes;  machine.py: what this machine must have
drill.py          rehearses accidents on a user's own run
"""
