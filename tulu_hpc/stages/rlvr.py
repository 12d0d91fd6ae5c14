"""Reinforcement learning with verifiable rewards: the GRPO family or PPO, on rollouts of the model that is trained.

The parts of a step are in `rlvr_step`. Every random number derives from (run.seed, step, prompt, sample), so a resumed
run repeats the one that was not interrupted, and the samples do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.tokenizer import load_tokenizer, padding_id
from tulu_hpc.models.llama import Llama
from tulu_hpc.parallel.communication import timed_collectives
from tulu_hpc.parallel.failures import WriteFailures
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.stages import training_run
from tulu_hpc.stages.rlvr_ahead import Ahead, open_ahead
from tulu_hpc.stages.rlvr_learner import Learner, ValueModel
from tulu_hpc.stages.rlvr_rollouts import fingerprint
from tulu_hpc.stages.rlvr_step import rollout_step
from tulu_hpc.stages.rlvr_throughput import RolloutThroughput
from tulu_hpc.stages.rlvr_values import open_value_model
from tulu_hpc.stages.rollouts import load_prompts, open_engine, open_verifiers, refuse_stop_strings, sampling_of
from tulu_hpc.stages.served import ServedEngine, check_served, start_servers
from tulu_hpc.stages.throughput import open_stragglers, total_peak
from tulu_hpc.stages.training_run import Run
from tulu_hpc.telemetry.progress import Progress
from tulu_hpc.training import checkpoint
from tulu_hpc.training.preemption import StopRequest
from tulu_hpc.training.runner import Runner
from tulu_hpc.training.trainer import DTYPES, Trainer, load_model


def run(config: RlvrConfig) -> Path:
    """Train on the prompts of `data.path` for `train.steps` rollout steps; return the run directory.

    A step makes rlvr.epochs x rlvr.minibatches optimizer steps; a minibatch in which no group has two different rewards
    makes none (and is counted). The schedule is laid out for all of them.

    Raises:
        ConfigError, RecordError, LayoutError: naming the key, file, line or rank.
        MismatchError: engine and trainer disagree about log-probs.
        EngineError: the rollout servers do not start, or are lost again and again.
        VerifierError: too many verdicts of a step were lost.
        SamplingError: dynamic sampling did not fill a step.
        StaleError: samples of older weights than allowed.
        JournalError: the buffer of an asynchronous run is damaged or of another run.
        ProducerError: generation or verification beside training failed.
        Preempted: the run was asked to stop; its state is saved.
    """
    check(config)
    run = training_run.open_run(config, "rlvr")
    if run.finished:
        return run.already_finished()
    with ExitStack() as stack:
        learner = build(run, config, stack)
        first = resume(learner)
        fit(learner, first, open_ahead(learner, first, stack))
        return training_run.finish(run, learner.trainer)


def check(config: RlvrConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        ConfigError: naming the keys.
    """
    if config.rollout.temperature == 0:
        raise ConfigError("rollout.temperature = 0: greedy answers to a prompt are all equal, nothing can be learned")
    refuse_stop_strings(config.rollout, "rlvr")
    if config.rollout.engine == "vllm":
        check_served(config)
    if config.rlvr.minibatches > config.rlvr.prompts_per_step:
        raise ConfigError(
            f"rlvr.minibatches = {config.rlvr.minibatches} is more than "
            f"rlvr.prompts_per_step = {config.rlvr.prompts_per_step}"
        )
    if config.rlvr.prompts_per_step * config.rlvr.samples_per_prompt >= 2**24:
        raise ConfigError("rlvr.prompts_per_step x rlvr.samples_per_prompt must stay below 2^24")
    if config.data.max_length + config.rollout.max_new_tokens > config.train.pack_rows:
        raise ConfigError(
            f"train.pack_rows = {config.train.pack_rows} does not hold a prompt of data.max_length = "
            f"{config.data.max_length} with rollout.max_new_tokens = {config.rollout.max_new_tokens}"
        )


def build(run: Run, config: RlvrConfig, stack: ExitStack) -> Learner:
    """Load prompts, policy and reference; rollout servers and workers of the verifier end with `stack`."""
    served = start_servers(run, config, stack) if config.rollout.engine == "vllm" else None
    tokenizer = load_tokenizer(config.model.path, run.architecture.vocab_size)
    prompts = load_prompts(config.data, config.verifier, tokenizer, run.say)
    rlvr = config.rlvr
    updates = config.train.steps * rlvr.epochs * rlvr.minibatches
    trainer = training_run.make_trainer(run, total_steps=updates)
    reference = None
    if rlvr.kl_coef > 0:
        frozen = load_model(config.model, run.groups, run.architecture)
        reference = Runner.create(
            frozen,
            run.groups,
            run.architecture,
            split=config.parallel.context_split,
            strategy=config.model.attention_strategy,
        )
    sample_as_rollouts(config, [*trainer.models, *(reference.chunks if reference else [])])
    engine: EmbeddedEngine | ServedEngine
    if served is None:
        engine = open_engine(config.rollout, trainer.models, run.groups, run.architecture, tokenizer)
    else:
        engine = ServedEngine(run, config, trainer, *served)
    value = open_value_model(run, config, updates) if config.value is not None else None
    return Learner(
        run=run,
        config=config,
        trainer=trainer,
        reference=reference,
        engine=engine,
        pool=open_verifiers(config.verifier, run.groups, stack),
        prompts=prompts,
        sampling=sampling_of(config.rollout, tokenizer, config.model.path),
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        throughput=open_throughput(run, config, trainer, reference, value),
        value=value,
    )


def sample_as_rollouts(config: RlvrConfig, models: Sequence[Any]) -> None:
    """Ratios and KL are of the policy that samples: its temperature is in the log-probs of the trainer's models too."""
    for model in models:
        assert isinstance(model, Llama)
        model.logprob_temperature = config.rollout.temperature


def open_throughput(
    run: Run, config: RlvrConfig, trainer: Trainer, reference: Runner | None, value: ValueModel | None
) -> RolloutThroughput:
    """Accounting of this run: all models report to the clock of the policy's trainer. Collective."""
    peak, sentence = total_peak(run.groups, DTYPES[config.model.dtype], config.telemetry.peak_tflops)
    run.say(sentence)
    value_peak = peak
    if reference is not None:
        reference.use_clock(trainer.clock)
    if value is not None:
        assert config.value is not None
        value.trainer.use_clock(trainer.clock)
        if config.value.model.dtype != config.model.dtype:
            value_peak, _ = total_peak(run.groups, DTYPES[config.value.model.dtype], config.telemetry.peak_tflops)
    return RolloutThroughput(
        groups=run.groups,
        telemetry=config.telemetry,
        directory=run.directory.root,
        clock=trainer.clock,
        peak_flops=peak,
        value_peak_flops=value_peak,
    )


def resume(learner: Learner) -> int:
    """Continue from the newest intact checkpoint, if there is one; rollout steps done.

    Raises:
        ConfigError: the prompts are not those that the checkpoint was made with.
    """
    run = learner.run
    found = checkpoint.load_latest(learner.trainer, run.directory.checkpoints, learner.partners)
    if found is None:
        return 0
    _, extra = found
    if extra["prompts"] != fingerprint(learner.prompts):
        raise ConfigError(
            f"{run.directory.root}: cannot resume, the prompts of data.path have changed since it was saved"
        )
    learner.engine.version = learner.trainer.step
    learner.position, learner.versions = int(extra["prompt_position"]), list(extra["versions"])
    run.say(f"resumed at step {extra['rollout_step']} of {learner.config.train.steps}")
    return int(extra["rollout_step"])


def fit(learner: Learner, first: int, ahead: Ahead | None) -> None:
    """Rollout steps `first` + 1 to `train.steps`; log, save, and stop early when asked to.

    Args:
        ahead: who has the groups of an asynchronous run.

    Raises:
        Preempted: the run was asked to stop; its state is saved.
    """
    run, config = learner.run, learner.config
    train, main = config.train, run.groups.is_main
    logger = training_run.open_logger(run, first)
    failures = WriteFailures(run.groups)
    progress = Progress("rlvr", train.steps, start=first, enabled=main, interval=0.0 if train.steps <= 20 else None)
    stop = StopRequest(run.directory.stop_requested, run.directory.preempted, is_main=main)
    saver = training_run.make_saver(run, learner.trainer, learner.partners)
    profiler = training_run.open_profiler(run, failures)
    open_stragglers(run.groups, run.directory.root, first)
    with logger, progress, stop, saver, timed_collectives(learner.trainer.clock):
        for step in range(first + 1, train.steps + 1):
            with profiler.step(step):
                metrics, stopping = rollout_step(
                    learner, step, check_mismatch=step == first + 1, stop_requested=stop.pending(), ahead=ahead
                )
            if step % train.log_every == 0 or step == train.steps:
                with failures.writing(str(run.directory.metrics)):
                    logger.log(step, metrics)
                failures.check()
            progress.update(
                step,
                tokens=metrics["rollout/new_tokens"],
                reward=metrics["rollout/reward"],
                accuracy=metrics["rollout/accuracy"],
                **({"kl": metrics["train/kl"]} if "train/kl" in metrics else {}),
            )
            saver.observe(metrics)
            saver.poll()
            last = step == train.steps
            if last or stopping or (train.save_every and step % train.save_every == 0):
                # Without an update since the last one nothing is saved: those steps are repeated, with the same result.
                extra = {
                    "rollout_step": step,
                    "prompts": fingerprint(learner.prompts),
                    "prompt_position": learner.position,
                    "versions": learner.versions,
                    **({} if ahead is None else {"buffer": ahead.position(step)}),
                }
                saver.save(extra, wait=last or stopping)
            if ahead is not None:
                ahead.prune()
            if stopping and not last:
                run.say(f"stopped on request after step {step}; start again to continue")
                stop.acknowledge(step)
