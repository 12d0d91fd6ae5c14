"""`tulu-hpc recipe`: the steps of a recipe one after the other, each as a child process; then the report.

A finished step leaves a marker, `{root}/.recipe/NAME.json`: its resolved configuration, digests of the files it read
and the files it wrote. A second run reuses what is finished and unchanged, continues what was interrupted (training
steps resume from their run directories, cheap steps run again) and refuses what was changed, with the difference.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, Field, ValidationError

from tulu_hpc.config import schema
from tulu_hpc.config.loader import ConfigError, dump_yaml, flatten, load_config
from tulu_hpc.config.run_directory import MAY_DIFFER, differences
from tulu_hpc.config.verbs import SCHEMAS
from tulu_hpc.stages.child import ChildResult, run_child
from tulu_hpc.stages.step_files import check_files, digests, files_below, inputs_of, missing, outputs_of
from tulu_hpc.telemetry.files import write_atomically
from tulu_hpc.telemetry.progress import duration
from tulu_hpc.telemetry.report import ReportInputs, Timing, score_lines, write_report

# Said by libraries at every start, about things that we do on purpose; other warnings are shown.
_KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "`torch.distributed.",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead and we are deprecating ShardedTensor",
)
_ERROR = re.compile(r"(\[rank \d+\] )?error: ")
_LOCK_WAIT_SECONDS = 60.0
# What torchrun sets; a child must not believe that it is one of somebody else's workers.
_TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class RecipeError(ValueError):
    """A step failed, or what an earlier run left does not fit this one."""


class Marker(BaseModel):
    """What a finished step leaves; `inputs` maps paths to digests."""

    step: str
    verb: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: list[str]
    seconds: float = Field(ge=0, allow_inf_nan=False)
    finished: str


@dataclass(frozen=True)
class Step:
    """One step, its configuration resolved; `overrides` are what its command line gets."""

    name: str
    verb: list[str]
    path: str
    processes: int
    overrides: list[str]
    config: Any

    @property
    def options(self) -> list[str]:
        return [word for word in self.verb if word.startswith("-")]

    @property
    def command(self) -> list[str]:
        program = ["-m", "tulu_hpc", *self.verb, self.path, *self.overrides]
        if self.processes == 1:
            return [sys.executable, *program]
        # --standalone takes a free port itself, so recipes side by side do not clash.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        return [sys.executable, *torchrun, "--nproc-per-node", str(self.processes), *program]


def run(config: schema.RecipeConfig, *, dry_run: bool = False) -> Path:
    """Run the recipe and return the path of the report.

    Raises:
        ConfigError: a step's configuration is wrong (checked for all steps before the first one runs).
        RecipeError: a step failed (message: step, log file, last lines), or a finished step was made with another
            configuration or from other files (message: the differences).
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once the child has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("recipe starts its own processes; run it without torchrun")
    steps = resolve_steps(config)
    root = Path(config.run.root)
    if dry_run:
        for step in steps:
            print(f"{step.name}: {shlex.join(step.command)}")
        return Path(config.report.output)
    start = time.monotonic()
    state = root / ".recipe"
    state.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(state / "lock")
    try:
        markers = {step.name: _read_marker(state, step) for step in steps}
        timings: list[Timing] = []
        for number, step in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            marker = markers[step.name]
            gone = missing(marker.outputs) if marker else []
            if marker and not gone:
                _refuse_changed_inputs(step, markers, state)
                print(f"{title}: reused (made {marker.finished} in {duration(marker.seconds)})", flush=True)
                timings.append(Timing(step.name, step.processes, marker.seconds, reused=True))
                continue
            why = f" again: {gone[0]} is missing" if gone else ""
            processes = f" on {step.processes} processes" if step.processes > 1 else ""
            print(f"{title}: {' '.join(step.verb)} {step.path}{processes}{why}", flush=True)
            made = markers[step.name] = _run_step(step, root, state, lock, gone)
            print(f"{title}: done in {duration(made.seconds)}", flush=True)
            timings.append(Timing(step.name, step.processes, made.seconds, reused=False))
        inputs = _report_inputs(config, steps, timings, time.monotonic() - start)
        path = write_report(inputs, Path(config.report.output))
        for line in score_lines(inputs):
            print(line)
        print(f"report: {path}\ntotal time: {duration(time.monotonic() - start)}", flush=True)
        return path
    finally:
        os.close(lock)


def resolve_steps(config: schema.RecipeConfig) -> list[Step]:
    """Load every step's configuration with the recipe's root, seed and overrides.

    Raises:
        ConfigError: unknown verb, repeated name, overrides of a step that is not there, or a step's file is wrong.
    """
    names = [step.name for step in config.steps]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"steps: the name {name!r} is used twice")
    for name in config.overrides:
        if name not in names:
            raise ConfigError(f"overrides.{name}: no such step; steps are {', '.join(names)}")
    return [_resolve_step(step, config) for step in config.steps]


def _resolve_step(step: schema.RecipeStep, config: schema.RecipeConfig) -> Step:
    words = step.verb.split()
    verb = " ".join(word for word in words if not word.startswith("-"))
    if verb not in SCHEMAS or verb == "recipe":
        known = ", ".join(name for name in SCHEMAS if name != "recipe")
        raise ConfigError(f"step {step.name}: unknown verb {step.verb!r}; known: {known}")
    if words != verb.split() and step.verb not in ("eval --unseen", "eval --both"):
        raise ConfigError(f"step {step.name}: {step.verb!r}: the only options of a step are eval's --unseen and --both")
    values: dict[str, object] = {"run.root": config.run.root, "run.seed": config.run.seed}
    if config.run.threads is not None:
        values["run.threads"] = config.run.threads
    values.update(flatten(step.overrides))
    values.update(flatten(config.overrides.get(step.name, {})))
    # JSON is YAML's flow style, so every value survives the way through the command line.
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items() if key]
    try:
        resolved = load_config(step.config, overrides, SCHEMAS[verb], origin="overrides")
        check_files(resolved)
        outputs_of(resolved)  # a result that no later step could find is refused now, not at its end
    except ValueError as error:
        raise ConfigError("\n".join(f"step {step.name}: {line}" for line in str(error).splitlines())) from error
    return Step(step.name, words, step.config, step.processes, overrides, resolved)


def _run_step(step: Step, root: Path, state: Path, lock: int, gone: Sequence[str]) -> Marker:
    """Run it to its end and mark it as finished; `gone` are files that an earlier run had written."""
    log = root / "logs" / f"{step.name}.log"
    read = digests(inputs_of(step.config))
    result = run_child(
        step.command, environment=_environment(step), log=log, prefix=f"[{step.name}] ", keep_open=[lock]
    )
    written = outputs_of(step.config, step.options)
    if result.stopped_by is not None and (result.returncode != 0 or missing(map(str, written))):
        _stop(step, result.stopped_by)
    if result.returncode != 0:
        raise RecipeError(_failure(step, result, log))
    if not_there := missing([*map(str, written), *gone]):
        # A step that finds its work done writes nothing; without the directory it has to.
        whole = next((path for path in written if path.is_dir() and Path(not_there[0]).is_relative_to(path)), None)
        hint = f"; remove {whole} to have all of it written again" if whole else ""
        raise RecipeError(f"step {step.name} ended without writing {not_there[0]}; log: {log}{hint}")
    marker = Marker(
        step=step.name,
        verb=" ".join(step.verb),
        config=step.config.model_dump(mode="json"),
        inputs=read,
        outputs=[str(path) for path in files_below(written)],
        seconds=round(result.seconds, 3),
        finished=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    write_atomically(_marker_path(state, step.name), marker.model_dump_json(indent=1))
    if result.stopped_by is not None:  # it finished all the same
        _stop(step, result.stopped_by)
    return marker


def _stop(step: Step, number: int) -> NoReturn:
    print(f"stopped in step {step.name}; the same command continues here", flush=True)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _failure(step: Step, result: ChildResult, log: Path) -> str:
    code = result.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    tail = "\n".join(f"  {line}" for line in telling_lines(result.last_lines))
    return f"step {step.name} {how}; log: {log}; last lines:\n{tail}"


def telling_lines(lines: Sequence[str], most: int = 12) -> list[str]:
    """Why a child failed: its `error: ...` lines, else its last lines before torchrun's own report."""
    errors = [line for line in lines if _ERROR.match(line)]
    if errors:
        return list(dict.fromkeys(errors))[-most:]
    ours = list(itertools.takewhile(lambda line: "torch/distributed/elastic/multiprocessing" not in line, lines))
    return (ours or list(lines))[-most:]


def _environment(step: Step) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _TORCHRUN_VARIABLES}
    cores = len(os.sched_getaffinity(0))
    # More threads than cores slow small models down by a factor, so each process gets its share and no more.
    threads = step.config.run.threads or max(1, cores // step.processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # All processes are on this machine: the loopback device works where the host name does not resolve.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Megatron asks for it under sequence parallelism: communication is launched before the GEMM that hides it.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{start}" for start in _KNOWN_WARNINGS))
    return environment


def _take_lock(path: Path) -> int:
    """Hold `path` for this run. Children inherit the lock, so it outlasts a killed driver until they are gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise RecipeError(f"{path.parent.parent}: another recipe is running there ({path} is locked)") from None
            if not told:
                print(f"{path.parent.parent} is in use; waiting for it up to {_LOCK_WAIT_SECONDS:.0f} s", flush=True)
                told = True
            time.sleep(0.5)


def _marker_path(state: Path, step: str) -> Path:
    return state / f"{step}.json"


def _read_marker(state: Path, step: Step) -> Marker | None:
    """The marker of a finished step, checked against the configuration of now; None when the step has not finished."""
    path = _marker_path(state, step.name)
    if not path.exists():
        return None
    remedy = f"take another run.root, or remove {path} (and what the step wrote) to make it again"
    try:
        marker = Marker.model_validate_json(path.read_bytes(), strict=True)
        old = type(step.config).model_validate_json(json.dumps(marker.config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])
        raise RecipeError(f"{path}: not a marker of this version ({problem}); {remedy}") from error
    changed = differences(old, step.config, MAY_DIFFER)
    if marker.verb != " ".join(step.verb):
        changed.insert(0, f"verb: {marker.verb!r} -> {' '.join(step.verb)!r}")
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise RecipeError(f"step {step.name} was made with another configuration:\n{lines}\n{remedy}")
    return marker


def _refuse_changed_inputs(step: Step, markers: Mapping[str, Marker | None], state: Path) -> None:
    """A changed file of another step may be restored by that step, or be meant: the message tells both ways."""
    own = markers[step.name]
    assert own is not None
    now = digests(inputs_of(step.config))
    changed = sorted(key for key in {**now, **own.inputs} if now.get(key) != own.inputs.get(key))
    if not changed:
        return
    remedies = ["take another run.root"]
    for name, marker in markers.items():
        if marker and any(Path(written).is_relative_to(key) for written in marker.outputs for key in changed):
            remedies.append(f"remove {_marker_path(state, name)} to have step {name} write its files again")
    remedies.append(f"remove {_marker_path(state, step.name)} and what the step wrote to make it from them as they are")
    names = ", ".join(changed)
    raise RecipeError(f"step {step.name} was made from other files: {names} changed since; {', or '.join(remedies)}")


def _report_inputs(
    config: schema.RecipeConfig, steps: list[Step], timings: list[Timing], seconds: float
) -> ReportInputs:
    report = config.report
    configs = {"recipe": dump_yaml(config), **{step.name: dump_yaml(step.config) for step in steps}}
    return ReportInputs(
        title=report.title,
        evals={stage: Path(path) for stage, path in report.evals.items()},
        before=Path(report.before) if report.before else None,
        runs={stage: Path(path) for stage, path in report.runs.items()},
        decontamination=Path(report.decontamination) if report.decontamination else None,
        preference=Path(report.preference) if report.preference else None,
        notes=report.notes,
        timings=timings,
        total_seconds=seconds,
        configs=configs,
    )
