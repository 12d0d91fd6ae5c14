"""What `tulu-hpc doctor` and `tulu-hpc bench` call."""
