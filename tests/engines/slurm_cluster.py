"""A real Slurm on this machine: munged, slurmctld and one slurmd per virtual node, on loopback, all under one folder.

Needs root and the Debian packages slurm-wlm and munge (its slurmd allows several nodes per host).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PACKAGES = ("slurm-wlm", "munge")

CONFIGURATION = """
ClusterName=tulu
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=2
NodeName=node[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_node_port}-{last_node_port}] CPUs=64 \
Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=20000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> str | None:
    """Install Slurm when this is allowed; returns why it cannot be used, or None."""
    if os.geteuid() != 0:
        return "needs root (munged and slurmd run as root)"
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return f"needs {', '.join(PACKAGES)} and there is no apt-get to install them"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *PACKAGES]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode:
            return f"`{' '.join(command)}` failed: {result.stderr.strip()[-300:]}"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"installed, but without {', '.join(missing)}" if missing else None


def free_ports(count: int) -> int:
    """First of `count` consecutive free ports."""
    for first in range(17000, 60000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")


def wait_for(condition: Callable[[], bool], seconds: float, what: str, interval: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(interval)


class SlurmCluster:
    """Started by `start()`, ended by `stop()`, which also ends what slurmd leaves behind."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        self.root, self.nodes = root, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        for name in ("state", "log", "spool", "munge"):
            (self.root / name).mkdir(parents=True)
        for folder in (self.root, *self.root.parents):
            # munged refuses a socket below folders that others cannot traverse.
            if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o711)
        munge = self.root / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        files["seed-file"] = munge / "seed"
        self.run("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        port = free_ports(self.nodes + 1)
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                root=self.root,
                port=port,
                first_node_port=port + 1,
                last_node_port=port + self.nodes,
                last=self.nodes - 1,
            )
        )
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.run("slurmctld", "-c")
        for node in range(self.nodes):
            (self.root / "spool" / f"node{node}").mkdir()
            self.run("slurmd", "-N", f"node{node}")
        wait_for(self._all_idle, 30, "nodes idle")

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()
        return states == ["idle"] * self.nodes

    def run(self, *command: str, check: bool = True) -> str:
        """Run a Slurm command against this cluster; returns what it prints."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=self.root
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {result.returncode}: {result.stderr.strip()}")
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait_for_state(self, job_id: str, states: set[str], seconds: float) -> str:
        bad = {"FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"} - states

        def reached() -> bool:
            state = self.job(job_id)["JobState"]
            if state in bad:
                raise RuntimeError(f"job {job_id} is {state}")
            return state in states

        wait_for(reached, seconds, f"job {job_id} in {sorted(states)}", interval=0.5)
        return self.job(job_id)["JobState"]

    def stop(self) -> None:
        """End all jobs and daemons; slurmstepd and job processes can outlive their slurmd and are ended by pid."""
        self.run("scancel", "--user=root", check=False)
        with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
            wait_for(lambda: not self.run("squeue", "-h", "-t", "R,CG,PD", check=False).strip(), 15, "jobs ended")
        orphans = self._orphans()  # before slurmd goes: afterwards a dead step's children have another parent
        pid_files = [*self.root.glob("slurmd-*.pid"), self.root / "slurmctld.pid", self.root / "munge" / "pid"]
        pids = [int(path.read_text()) for path in pid_files if path.exists() and path.read_text().strip()]
        daemons = {psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)}
        for daemon in daemons:
            daemon.terminate()
        _, alive = psutil.wait_procs(daemons, timeout=10)
        for process in {*alive, *orphans, *self._orphans()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _orphans(self) -> set[psutil.Process]:
        """slurmstepd processes of this cluster (they carry its SLURM_CONF) with all below them."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.info["name"] != "slurmstepd":
                    continue
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found |= {process, *process.children(recursive=True)}
        return found
