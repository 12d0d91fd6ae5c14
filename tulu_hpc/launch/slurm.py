"""Renders a training run as a Slurm batch script and submits it.

The template (`configs/slurm/train.sbatch.j2`) is plain and meant to be copied: containers, modules and site rules
belong to the site, and enter through `setup`, `srun_options`, `sbatch_options` or a template of one's own.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from tulu_hpc.config.loader import find_config

TEMPLATE = Path("configs/slurm/train.sbatch.j2")
_TIME = re.compile(r"^(\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$")


class LaunchError(ValueError):
    """A job that cannot be written or submitted."""


@dataclass(frozen=True)
class SlurmJob:
    """One training job.

    `arguments` is what follows `tulu-hpc` (verb, file, overrides). `run_dir` must be fixed: a requeued job finds
    its checkpoint there. `save_seconds`: how long before the time limit the trainer is asked to save; more than one
    step plus one checkpoint.
    """

    arguments: Sequence[str]
    run_dir: Path
    nodes: int
    processes_per_node: int
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    time_limit: str = "24:00:00"
    save_seconds: int = 600
    exclusive: bool = False
    job_name: str = "tulu-hpc"
    work_dir: Path = field(default_factory=Path.cwd)
    python: str = sys.executable
    master_addr: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()
    sbatch_options: Sequence[str] = ()
    srun_options: str = ""

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node", "save_seconds"):
            if getattr(self, name) < 1:
                raise LaunchError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        directives = {"job-name": self.job_name, "partition": self.partition or "", "account": self.account or ""}
        for option, value in directives.items():
            if re.search(r"\s", value) or not value.isprintable():
                raise LaunchError(f"{option} {value!r}: an #SBATCH line takes one word, without blanks and line breaks")
        for option, values in (("sbatch", self.sbatch_options), ("srun", [self.srun_options])):
            for value in values:
                if not value.isprintable():
                    raise LaunchError(f"{option} {value!r}: one line, without control characters")
        if not _TIME.fullmatch(self.time_limit):
            raise LaunchError(f"time {self.time_limit!r}: expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS")
        if time_limit_seconds(self.time_limit) <= self.save_seconds:
            raise LaunchError(
                f"time {self.time_limit} ({time_limit_seconds(self.time_limit)} s) leaves nothing before the request "
                f"to save {self.save_seconds} s earlier; raise --time or lower --save-seconds"
            )
        if re.search(r"\s", str(self.run_dir)):
            # Slurm reads the output path of an #SBATCH line up to the first blank.
            raise LaunchError(f"run.dir {str(self.run_dir)!r}: Slurm log paths cannot contain blanks")


def time_limit_seconds(text: str) -> int:
    """Seconds of a Slurm time: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (parts + [0, 0])[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    if len(parts) == 2:
        return parts[0] * 60 + parts[1]
    return (parts[0] * 60 + parts[1]) * 60 + parts[2]


def find_template(path: Path | None = None) -> Path:
    """The given template, else the one of the working directory, of the checkout, or of the installed package."""
    found = path or find_config(TEMPLATE)
    if not found.is_file():
        raise LaunchError(f"no batch template at {found}; give --template")
    return found


def render(job: SlurmJob, template: Path | None = None) -> str:
    """The batch script.

    Raises:
        LaunchError: the template is missing, does not parse, or uses a name that a job does not have.
    """
    path = find_template(template)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    values = {name: getattr(job, name) for name in job.__dataclass_fields__}
    # The template has it inside the single quotes of `bash -c '...'`, so the quotes it needs there are quoted again.
    values["python"] = shlex.quote(job.python).replace("'", "'\"'\"'")
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise LaunchError(f"{path}{f':{line}' if line else ''}: {error}") from error


def submit(script: str, path: Path) -> str:
    """Write the script to `path`, hand it to `sbatch` and return the job id."""
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch: not found; run this on a login node of the cluster, or use --dry-run to see the job")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise LaunchError(f"sbatch refused {path}: {' '.join(result.stderr.split())}")
    return result.stdout.strip().split(";")[0]


def parse_environment(assignments: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping."""
    parsed: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"--env {text!r}: expected NAME=VALUE")
        parsed[name] = value
    return parsed
