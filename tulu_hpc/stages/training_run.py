"""What the training stages share: opening a run, the loop with its log, checkpoints and stops, and the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.layer_spec import row_step
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.run_directory import RunDirectory
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.config.sections import ModelSection
from tulu_hpc.config.verbs import TrainingConfig
from tulu_hpc.data import sample_log
from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.data.flops import forward_flops, item_work
from tulu_hpc.data.loader import ItemLoader, StepData
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.data.sample_log import SampleAuditError, SampleLog
from tulu_hpc.data.tokenizer import load_tokenizer, padding_id
from tulu_hpc.models.convert import save_hf
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.models.transformer_engine import check_layers
from tulu_hpc.parallel.communication import timed_collectives
from tulu_hpc.parallel.failures import WriteFailures, shared_writing
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.stages.throughput import Throughput, of_value_model, open_stragglers, total_peak
from tulu_hpc.stages.training_data import kind_of, read_items, weight_field_of, write_preview
from tulu_hpc.telemetry.files import write_atomically
from tulu_hpc.telemetry.metrics import MetricLogger, TelemetryError
from tulu_hpc.telemetry.profiling import StepProfiler
from tulu_hpc.telemetry.progress import Progress
from tulu_hpc.training import checkpoint, determinism
from tulu_hpc.training.non_finite import NonFiniteWatch
from tulu_hpc.training.partner import Partner
from tulu_hpc.training.preemption import StopRequest
from tulu_hpc.training.retention import Retention
from tulu_hpc.training.runner import LossFn, row_multiple
from tulu_hpc.training.saver import Saver
from tulu_hpc.training.step import StepResult, train_step
from tulu_hpc.training.trainer import DTYPES, Trainer, build_trainer

FINISHED = "finished.json"


@dataclass(frozen=True)
class Run:
    """An opened run on this process."""

    verb: str
    config: TrainingConfig
    groups: Groups
    directory: RunDirectory
    architecture: Architecture

    def say(self, text: str) -> None:
        """Print once per job."""
        if self.groups.is_main:
            print(f"{self.verb}: {text}", flush=True)

    def progress(self, title: str, total: int) -> Progress:
        """A progress line of its own, shown once per job."""
        return Progress(f"{self.verb} {title}", total, enabled=self.groups.is_main)

    @property
    def finished(self) -> bool:
        """Whether an earlier start completed this run and its whole export is still there (the same on every rank)."""
        there = self._is_finished() if self.groups.is_main else None
        return bool(self.groups.broadcast_object(there))

    def _is_finished(self) -> bool:
        mark = self.directory.root / FINISHED
        if not mark.is_file():
            return False
        exported = json.loads(mark.read_text())["exported"]
        if self.config.train.export_hf and not exported:
            return False
        return all((self.directory.hf / name).is_file() for name in exported)

    def already_finished(self) -> Path:
        """Say that there is nothing to do; the run directory."""
        self.say(f"nothing to do, {self.directory.root} is finished")
        return self.directory.root


def open_run(config: TrainingConfig, verb: str) -> Run:
    """Start the processes' groups and open (or reopen) the run directory.

    Raises:
        ConfigError: the directory holds another run, or the model is not the expected one.
        LayoutError: the number of processes does not fit the layout.
        LayerSpecError: Transformer Engine's layers are asked for and cannot be imported.
    """
    groups, architecture = join(config)
    directory = RunDirectory.open(config, verb=verb, is_main=groups.is_main, broadcast=groups.broadcast_object)
    checkpoint.clean(directory.checkpoints, groups)
    return Run(verb, config, groups, directory, architecture)


def join(config: TrainingConfig) -> tuple[Groups, Architecture]:
    """Start the processes' groups and read the shape of the model; without a run directory."""
    determinism.configure(deterministic=config.run.deterministic, threads=config.run.threads)
    check_layers(config.model.layer_spec)
    groups = initialize(
        layout_of(config.parallel, row_step(config.model, config.parallel, config.train.pack_rows)),
        seed=config.run.seed,
        timeout_minutes=config.run.distributed_timeout_minutes,
    )
    return groups, read_architecture(config.model)


def read_architecture(model: ModelSection) -> Architecture:
    """Shape of the model at `model.path`.

    Raises:
        ConfigError: it is not what `model.architecture` expects; every differing key with both values.
    """
    found = Architecture.from_hf(model.path)
    if model.architecture is not None and found != model.architecture:
        wanted = model.architecture.model_dump()
        differing = [f"{k}: {wanted[k]} -> {v}" for k, v in found.model_dump().items() if wanted[k] != v]
        raise ConfigError(f"{model.path}: is not the expected model.architecture: {'; '.join(differing)}")
    return found


def load_items(run: Run, paths: Sequence[str] | None = None) -> tuple[list[Item], int]:
    """Every item of `paths` (None: `data.path`), tokenised, and the token that pads packs.

    Raises:
        RecordError: a malformed row with its file, line and field (unless data.on_error is skip: counted and reported).
        MaskProofError: a conversation whose label mask cannot be proven, with the span.
    """
    tokenizer = load_tokenizer(run.config.model.path, run.architecture.vocab_size)
    data = run.config.data if paths is None else run.config.data.model_copy(update={"path": list(paths)})
    assert not isinstance(run.config, RlvrConfig)  # has prompts, not items
    items, lines = read_items(data, tokenizer, kind_of(run.config), run.say, weight_field=weight_field_of(run.config))
    rows = run.config.train.preview_rows
    if items and rows and paths is None:
        title, readout = f"{run.config.run.name}: what is trained", run.verb == "rm"
        with shared_writing(run.groups, str(run.directory.masks)):
            if run.groups.is_main:
                write_preview(
                    run.directory.masks, items, tokenizer, title=title, rows=rows, lines=lines, readout=readout
                )
    return items, padding_id(tokenizer)


def make_loader(run: Run, items: list[Item], *, pad_id: int) -> ItemLoader:
    """The loader of this data-parallel rank."""
    assert not isinstance(run.config, RlvrConfig)  # draws its prompts itself
    train, groups = run.config.train, run.groups
    return ItemLoader(
        items,
        global_batch_size=train.global_batch_size,
        global_batch_tokens=train.global_batch_tokens,
        seed=run.config.run.seed,
        epochs=train.epochs,
        steps=train.steps,
        shuffle=run.config.data.shuffle,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        pack_rows=train.pack_rows,
        multiple=row_multiple(groups.layout, run.config.parallel.context_split),
        share=train.prefix_sharing,
        pad_id=pad_id,
        cost=item_cost(run.architecture, share=train.prefix_sharing),
    )


def item_cost(architecture: Architecture, *, share: bool) -> Callable[[Item], float]:
    """FLOPs of an item, by which the data-parallel ranks' shares are balanced."""
    return lambda item: forward_flops(architecture, item_work(item, share=share)).total


def make_trainer(run: Run, *, total_steps: int, load_weights: bool = True, head: Head = "logprobs") -> Trainer:
    """The model of the configuration, ready to train; a scalar head that `model.path` lacks is drawn by run.seed."""
    config = run.config
    trainer = build_trainer(
        model=config.model,
        parallel=config.parallel,
        optimizer=config.optimizer,
        recompute=config.train.recompute,
        total_steps=total_steps,
        groups=run.groups,
        architecture=run.architecture,
        load_weights=load_weights,
        head=head,
        new_head_seed=config.run.seed,
    )
    trainer.watch = NonFiniteWatch(config.train.nan_watch, run.directory.root)
    return trainer


def resume(run: Run, trainer: Trainer, loader: ItemLoader) -> None:
    """Continue from the newest intact checkpoint of the run directory, if there is one."""
    found = checkpoint.load_latest(trainer, run.directory.checkpoints)
    if found is None:
        return
    step, extra = found
    loader.load_state_dict(extra["loader"])
    run.say(f"resumed at step {step} of {loader.num_steps}")


def fit(
    run: Run,
    trainer: Trainer,
    loader: ItemLoader,
    make_loss: Callable[[StepData], LossFn],
    *,
    evaluate: Callable[[int], dict[str, float]] = lambda step: {},
) -> None:
    """Train to the end of the loader; log, save, and stop early when asked to.

    Args:
        make_loss: the loss of one global batch, from that batch's data (its denominators).
        evaluate: called on every rank after each step with its number; what it returns is logged with the step.

    Raises:
        Preempted: the run was asked to stop; its state is saved.
    """
    train, total = run.config.train, loader.num_steps
    main = run.groups.is_main
    logger = open_logger(run, trainer.step)
    # A short run is one that somebody compares digit by digit: every step is shown.
    interval = 0.0 if total <= 20 else None
    progress = Progress(run.verb, total, start=trainer.step, enabled=main, interval=interval)
    stop = StopRequest(run.directory.stop_requested, run.directory.preempted, is_main=main)
    failures = WriteFailures(run.groups)
    profiler = open_profiler(run, failures)
    clock = trainer.clock
    throughput = _throughput(run, trainer)
    saver = make_saver(run, trainer)
    samples = open_sample_log(run, loader, trainer.step)
    with logger, progress, stop, saver, timed_collectives(clock), samples:
        while trainer.step < total:
            with profiler.step(trainer.step + 1):
                clock.start()
                with clock.phase("data"):
                    data = loader.next_step()
                    loss = make_loss(data)
                result = train_step(trainer, data.packs, loss, stop_requested=stop.pending())
                marks = clock.stop()
            ids = [i for pack in data.packs for i in pack.item_ids]
            with failures.writing("the sample log"):
                samples.write(result.step, ids, batch=data.num_items_global, left_out=result.skipped)
            throughput.add(result, marks)
            evaluated = evaluate(result.step)
            last = result.step == total
            saves = last or result.stop_requested or (train.save_every and result.step % train.save_every == 0)
            logs = result.step % train.log_every == 0 or last or evaluated
            if logs:
                metrics = {**_metrics(result), **throughput.metrics(), **evaluated}
                with failures.writing(str(run.directory.metrics)):
                    logger.log(result.step, metrics)
            if logs or saves:
                failures.check()
            progress.update(result.step, tokens=result.rows, loss=f"{result.loss:.7f}", lr=result.lr)
            saver.observe({**_named(result), **evaluated}, known=[_name(each) for each in trainer.metric_names])
            saver.poll()
            if saves:
                saver.save({"loader": loader.state_dict()}, wait=last or result.stop_requested)
            if result.stop_requested and not last:
                run.say(f"stopped on request after step {result.step}; start again to continue")
                stop.acknowledge(result.step)


def open_logger(run: Run, resume_step: int) -> MetricLogger:
    """The sinks of this run, written by the main process. Collective.

    Raises:
        WriteError, TelemetryError: on every rank; a file cannot be opened, a sink cannot be used.
    """
    telemetry = run.config.telemetry
    loggers: list[MetricLogger] = []
    with shared_writing(run.groups, str(run.directory.metrics), also=(TelemetryError,)):
        loggers.append(
            MetricLogger(
                run.directory,
                enabled=run.groups.is_main,
                tensorboard=telemetry.tensorboard,
                wandb=telemetry.wandb,
                resume_step=resume_step,
                name=run.config.run.name,
                config=run.config.model_dump(mode="json"),
            )
        )
    return loggers[0]


def open_sample_log(run: Run, loader: ItemLoader, step: int) -> SampleLog:
    """This process's log of the samples it trains on; one process per data-parallel rank writes. Collective.

    Raises:
        SampleAuditError: on every rank; the log is of other data, or cannot be written.
    """
    groups, folder = run.groups, run.directory.samples
    assert not isinstance(run.config, RlvrConfig)  # keeps its samples itself
    wanted = run.config.train.sample_log
    kept, failure = wanted, None
    if wanted and groups.is_main:
        try:
            kept = sample_log.begin(folder, loader.item_ids, resume_step=step)
        except (OSError, SampleAuditError) as error:
            failure = str(error)
    kept, failure = groups.broadcast_object((kept, failure))
    if failure:
        raise SampleAuditError(failure)
    if wanted and not kept:
        run.say(f"no sample log: the first {step} steps of this run were made without one")
    writes = kept and groups.tp_rank == groups.cp_rank == groups.pp_rank == 0
    return SampleLog(folder, dp_rank=groups.dp_rank, resume_step=step, enabled=writes)


def make_saver(run: Run, trainer: Trainer, partners: Sequence[Partner] = ()) -> Saver:
    """Writer of this run's checkpoints."""
    train = run.config.train
    return Saver(
        trainer,
        run.directory.checkpoints,
        retention=Retention(train.keep_last, train.keep_best, train.best_metric, train.best_mode),
        background=train.async_save,
        on_error=train.on_save_error,
        saved_step=trainer.step or None,
        partners=partners,
    )


def open_profiler(run: Run, failures: WriteFailures) -> StepProfiler:
    """Traces and memory snapshots of the steps that `telemetry` names.

    Raises:
        TelemetryError: as `StepProfiler`.
    """
    telemetry = run.config.telemetry
    return StepProfiler(
        run.directory.root,
        run.groups.rank,
        profile_steps=telemetry.profile_steps,
        memory_snapshot_steps=telemetry.memory_snapshot_steps,
        writing=failures.writing,
    )


def _throughput(run: Run, trainer: Trainer) -> Throughput:
    """Accounting of this run from the trainer's step on."""
    telemetry, architecture = run.config.telemetry, run.architecture
    if trainer.models[0].head == "value":
        architecture = of_value_model(architecture)
    peak, sentence = total_peak(run.groups, DTYPES[run.config.model.dtype], telemetry.peak_tflops)
    run.say(sentence)
    open_stragglers(run.groups, run.directory.root, trainer.step)
    return Throughput(
        groups=run.groups,
        architecture=architecture,
        recompute=run.config.train.recompute,
        telemetry=telemetry,
        directory=run.directory.root,
        clock=trainer.clock,
        peak_flops=peak,
    )


def finish(run: Run, trainer: Trainer) -> Path:
    """Export the model, mark the run as finished, and return its directory."""
    config = run.config
    if config.train.export_hf:
        trainer.synchronise_parameters()
        save_hf(
            trainer.models,
            run.directory.hf,
            run.architecture,
            run.groups,
            source=Path(config.model.path),
            dtype=DTYPES[config.model.dtype],
            chat_template=exported_template(config) if run.groups.is_main else None,
        )
    if not isinstance(config, RlvrConfig) and config.train.sample_log:
        audit_samples(run)
    mark = run.directory.root / FINISHED
    with shared_writing(run.groups, str(mark)):
        if run.groups.is_main:
            exported = sorted(file.name for file in run.directory.hf.iterdir()) if config.train.export_hf else []
            write_atomically(mark, json.dumps({"step": trainer.step, "exported": exported}) + "\n")
    run.say(f"finished {trainer.step} steps: {run.directory.root}")
    return run.directory.root


def audit_samples(run: Run) -> None:
    """Say what the sample log proves, if there is one. Collective.

    Raises:
        SampleAuditError: on every rank; a sample was left out or seen twice.
    """
    failure = None
    if run.groups.is_main and (run.directory.samples / sample_log.ITEMS).is_file():
        try:
            run.say(str(sample_log.audit(run.directory.samples)))
        except SampleAuditError as error:
            failure = str(error)
    if failure := run.groups.broadcast_object(failure):
        raise SampleAuditError(
            f"{failure}; checkpoints and export are there, start again without {run.directory.samples} to finish the "
            "run without this proof"
        )


def exported_template(config: TrainingConfig) -> str | None:
    """The template trained with, where it is not the tokenizer's own: who loads the export must prompt by it."""
    tokenizer = load_tokenizer(config.model.path)
    source = ChatTemplate.load(config.data.chat_template, tokenizer).source
    return None if source == tokenizer.chat_template else source


def _named(result: StepResult) -> dict[str, float]:
    """A step's metrics by name."""
    return {**{_name(name): value for name, value in result.metrics.items()}, "train/grad_norm": result.grad_norm}


def _name(name: str) -> str:
    """An objective's `loss` is `train/loss`, names with a room of their own stay."""
    return name if "/" in name else f"train/{name}"


def _metrics(result: StepResult) -> dict[str, float]:
    return {
        **_named(result),
        "train/lr": result.lr,
        "train/tokens": result.targets,
        "train/skipped_steps": result.skipped_steps,
    }
