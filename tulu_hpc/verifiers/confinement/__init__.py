"""Limits that a process puts on itself and cannot lift again, not even as root.

seccomp filters system calls, Landlock reading, capabilities and resource limits do the rest.

Nothing here imports the rest of the package: `child.py` loads these files alone, in an interpreter without packages.
"""
