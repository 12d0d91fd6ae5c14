"""Jobs on a cluster: batch scripts for Slurm and their submission."""
