"""`python -m tulu_hpc VERB ...`: the same program as `tulu-hpc`."""

from tulu_hpc.cli.entry import entry

if __name__ == "__main__":  # checkpoint writers spawn processes that import this module
    entry()
