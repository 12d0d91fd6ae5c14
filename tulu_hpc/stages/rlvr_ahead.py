"""Rollouts ahead of training: the groups of later steps are generated and verified while a step trains.

With k = async.max_staleness and W(n) the weights after step n, the requests of step n + k go to the engine when step n
begins, under W(n - 1). All ranks call everything here together; only the leader of a replica has a producer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_hpc.data.datasets import Prompt
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.rollout.engine import EngineError
from tulu_hpc.rollout.texts import completion_text
from tulu_hpc.stages import rlvr_gate
from tulu_hpc.stages.rlvr_buffer import TRAINED, Journal, JournalError, Sample, SampleKey, identity, prune
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rlvr_metrics import Clock
from tulu_hpc.stages.rlvr_mismatch import Mismatch
from tulu_hpc.stages.rlvr_off_policy import steps_behind
from tulu_hpc.stages.rlvr_producer import Job, Producer, ProducerError
from tulu_hpc.stages.rlvr_rollouts import Group, fingerprint, make_group, prompts_from, request_of, share_of_prompts
from tulu_hpc.stages.rlvr_sampling import Answer, Wanted
from tulu_hpc.stages.rollouts import LOSSES, broadcast_in_replica, is_replica_leader, verifier_record
from tulu_hpc.stages.served import ServedEngine
from tulu_hpc.telemetry.metrics import truncate_after
from tulu_hpc.training.retention import STATE, valid_steps
from tulu_hpc.verifiers.sandbox import loss_of

_ATTEMPTS = 3  # at a step's groups, each after restarting what has died
_SCORED = 4  # answers per step on which engine and trainer are compared


@dataclass
class Ahead:
    """What is generated ahead, on this process.

    Attributes:
        producer: on the leader of the replica.
        last: the last step that is trained.
        verdicts: of this replica in the present step, as `PoolStats` counts them.
        mismatch: between engine and trainer on scores of the present step, on the main process.
        refused: samples of all replicas that were too old in the present step, and were made again.
        trained: samples of all steps so far.
    """

    learner: Learner
    engine: ServedEngine
    producer: Producer | None
    folder: Path
    last: int
    trained: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    mismatch: Mismatch = field(default_factory=Mismatch)
    refused: int = 0
    _asked: int = 0  # the last step whose first round the producers know
    _pruned: list[int] = field(default_factory=list)
    _rows: list[list[Any]] = field(default_factory=list)

    @property
    def most(self) -> int:
        """async.max_staleness."""
        return self.learner.config.asynchrony.max_staleness

    # A step: begin, answer (which asks for groups once in each round of dynamic sampling), go_on, train, finish_step

    def begin(self, step: int) -> None:
        """Give the engine the step's weights, then the requests of the steps up to `step` + max_staleness.

        Raises:
            EngineError, ProducerError: on every rank.
        """
        rlvr = self.learner.config.rlvr
        self.refused, self.verdicts, self._rows = 0, dict.fromkeys(("verdicts", *LOSSES), 0), []
        self.mismatch = Mismatch()
        if self.engine.is_behind:
            if self.learner.config.asynchrony.update == "boundary":
                self._drain()
            self._send_weights()
            self._check_scores(step)
        numbers = list(range(rlvr.prompts_per_step))
        if rlvr.dynamic_sampling:  # where the next step begins in the stream of prompts is not known yet
            self._want(step, Wanted(numbers, self.learner.position), 0)
        else:
            for later in range(max(step, self._asked + 1), min(step + self.most, self.last) + 1):
                position = self.learner.position + (later - step) * rlvr.prompts_per_step
                self._want(later, Wanted(numbers, position), 0)
                self._asked = later
        self._start()

    def answer(self, step: int, clock: Clock) -> Answer:
        """What `sample_groups` asks for groups."""

        def wait(wanted: Wanted, extra: int) -> list[Group]:
            found = self.groups(step, wanted, extra)
            clock.lap("rollout")
            return found

        return wait

    def groups(self, step: int, wanted: Wanted, extra: int) -> list[Group]:
        """The scored groups of this replica for these places, as soon as all its answers are there.

        Raises:
            EngineError, ProducerError: on every rank, what went wrong on any.
        """
        mine = share_of_prompts(self.learner, wanted.numbers, wanted.position)
        jobs = self._want(step, wanted, extra)
        self._start()
        self._wait(jobs)
        if self._refuse_stale(jobs):
            self._start()
            self._wait(jobs)
        samples = [] if self.producer is None else self.producer.samples([job.key for job in jobs])
        samples = broadcast_in_replica(self.learner.run.groups, samples)
        if self.producer is not None:
            self._account(samples)
        return self._scored(mine, samples)

    def go_on(self, step: int, position: int) -> None:
        """With dynamic sampling: ask for the first round of the next step, whose place in the stream is known now."""
        rlvr = self.learner.config.rlvr
        if rlvr.dynamic_sampling and step < self.last:
            self._want(step + 1, Wanted(list(range(rlvr.prompts_per_step)), position), 0)
            self._start()

    def finish_step(self, step: int, groups: Sequence[Group], weights: int) -> None:
        """Note which samples the step has trained on.

        Args:
            groups: of this replica, that were trained on.
            weights: version that the step began with.

        Raises:
            WriteError: on every rank.
        """
        numbers = {group.number: group for group in groups}
        rows = [row for row in self._rows if row[0] in numbers and row[1] == self._round_of(row[0])]
        shares = self.learner.run.groups.all_gather_object(rows if self.producer is not None else [])
        found = sorted(row for share in shares for row in share)
        self.trained += len(found)
        with shared_writing(self.learner.run.groups, str(self.folder)):
            if self.learner.run.groups.is_main:
                with (self.folder / TRAINED).open("a") as file:
                    file.write(json.dumps({"step": step, "weights": weights, "samples": found}) + "\n")
        if self.producer is not None:
            self.producer.forget(step)

    def prune(self) -> None:
        """Delete the samples of steps that the newest checkpoint but one covers: the newest may prove to be damaged.

        Raises:
            WriteError: on every rank.
        """
        with shared_writing(self.learner.run.groups, str(self.folder)):
            checkpoints = self.learner.run.directory.checkpoints
            steps = valid_steps(checkpoints)[-2:] if self.learner.run.groups.is_main else []
            if len(steps) == 2 and steps != self._pruned:
                state = json.loads((checkpoints / f"step_{steps[0]}" / STATE).read_text())
                prune(self.folder, int(state["extra"]["rollout_step"]))
                self._pruned = steps

    def position(self, step: int) -> dict[str, int]:
        """Place in the buffer, for the checkpoint of a step."""
        return {"step": step, "samples": self.trained}

    # Parts

    def _round_of(self, number: int) -> int:
        """The round of dynamic sampling whose group a place has kept: its last."""
        return max(int(row[1]) for row in self._rows if row[0] == number)

    def _want(self, step: int, wanted: Wanted, extra: int) -> list[Job]:
        """Tell the producer; the jobs of this replica."""
        learner = self.learner
        jobs = [
            Job(
                SampleKey(step, extra, number, sample),
                prompt.record.id,
                request_of(learner, prompt, step, number, sample, extra),
                verifier_record(prompt.record),
            )
            for number, prompt in share_of_prompts(learner, wanted.numbers, wanted.position)
            for sample in range(learner.config.rlvr.samples_per_prompt)
        ]
        self._everywhere(lambda producer: producer.want(jobs))
        return jobs

    def _start(self) -> None:
        if self.producer is None:
            return
        serving = self.engine.client.serving()
        if self.learner.config.asynchrony.update == "in_flight":
            # Weights change while an answer is made: only the server can say which of them drew which token.
            serving = [(address, None) for address, _ in serving]
        client = self.engine.new_client(self.engine.client.addresses)
        client.use(serving)
        self.producer.start(client)

    def _wait(self, jobs: Sequence[Job]) -> None:
        """Until the producers of all replicas have these samples; lost servers are started again."""
        keys = [job.key for job in jobs]
        for _ in range(_ATTEMPTS):
            lost = self._everywhere(lambda producer: producer.wait(keys))
            if not lost:
                return
            self.learner.run.say(f"rollout servers lost: {lost}")
            self._drain()
            self._send_weights()
            self._start()
        logs = f"; see {self.learner.run.directory.root / 'rollout'}" if self.engine.own else ""
        raise EngineError(f"rollout servers were lost {_ATTEMPTS} times in one step{logs}: {lost}")

    def _drain(self) -> None:
        """Until nothing is with the servers of any replica; what was lost on the way is asked for later."""
        lost = self._everywhere(lambda producer: producer.wait())
        if lost:
            self.learner.run.say(f"rollout servers lost: {lost}")

    def _send_weights(self) -> None:
        if self.producer is not None:
            self.producer.set_updating(True)
        try:
            self.engine.send_weights()
        finally:
            if self.producer is not None:
                self.producer.set_updating(False)

    def _check_scores(self, step: int) -> None:
        """The mismatch gate on some answers of the step, scored by the engine with the weights that it has now."""
        learner = self.learner
        with_servers = sum(self._on_leaders(lambda producer: producer.busy))
        if with_servers >= len(self.engine.client.serving()) * learner.config.rollout.max_sequences:
            return  # they would wait behind the rollouts
        answers = []
        if learner.run.groups.is_main:
            assert self.producer is not None
            count = learner.config.rlvr.prompts_per_step
            prompts = prompts_from(learner.prompts, learner.config, learner.position, count)
            answers = [
                (prompts[sample.key.number].token_ids, sample.completion.token_ids)
                for sample in self.producer.some(step, _SCORED)
            ]
        answers = learner.run.groups.broadcast_object(answers)
        if answers:
            self.mismatch = rlvr_gate.check_scores(learner, step, answers)

    def _refuse_stale(self, jobs: Sequence[Job]) -> int:
        """Have samples that are too old made again; how many there were, on all replicas."""

        def refuse(producer: Producer) -> int:
            samples = producer.samples([job.key for job in jobs])
            old = [
                job
                for job, sample in zip(jobs, samples, strict=True)
                if steps_behind(sample.completion, self.learner.versions) > self.most
            ]
            producer.drop(old)
            return len(old)

        refused = sum(self._on_leaders(refuse))
        self.refused += refused
        return refused

    def _account(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.verdicts["verdicts"] += 1
            loss = loss_of(sample.reason)
            if loss is not None:
                self.verdicts[loss] += 1
            key = sample.key
            age = steps_behind(sample.completion, self.learner.versions)
            self._rows.append([key.number, key.extra_round, key.sample, age, sample.digest()])

    def _scored(self, mine: Sequence[tuple[int, Prompt]], samples: Sequence[Sample]) -> list[Group]:
        count = self.learner.config.rlvr.samples_per_prompt
        found = []
        for index, (number, prompt) in enumerate(mine):
            own = samples[index * count : (index + 1) * count]
            completions, scores = [each.completion for each in own], [each.score for each in own]
            found.append(make_group(self.learner.config, number, prompt, completions, scores))
        return found

    def _everywhere(self, action: Callable[[Producer], Any]) -> Any:
        """The first result of the replicas' leaders that says something, on every rank."""
        return next((found for found in self._on_leaders(action) if found is not None), None)

    def _on_leaders(self, action: Callable[[Producer], Any]) -> list[Any]:
        """Act on the leader of each replica; their results, on every rank.

        Raises:
            ProducerError: on every rank, what one of them raised.
        """
        groups = self.learner.run.groups
        result, failure = None, None
        if self.producer is not None:
            try:
                result = action(self.producer)
            except ProducerError as error:
                failure = f"[rank {groups.rank}] {error}"
        shares = groups.all_gather_object((self.producer is not None, result, failure))
        for _, _, problem in shares:
            if problem is not None:
                raise ProducerError(problem)
        return [found for leads, found, _ in shares if leads]


def open_ahead(learner: Learner, step: int, stack: ExitStack) -> Ahead | None:
    """Read the buffer of the run and start the producers, which end with `stack`; None for a synchronous run.

    Args:
        step: rollout steps done.

    Raises:
        JournalError: on every rank; the buffer is damaged or of another run.
    """
    config, run = learner.config, learner.run
    if config.asynchrony.max_staleness == 0:
        return None
    engine = learner.engine
    assert isinstance(engine, ServedEngine)  # the configuration refuses others
    folder = run.directory.root / "buffer"
    journal, done, trained, failure = None, {}, 0, None
    if is_replica_leader(run.groups):
        try:
            journal = Journal(folder, run.groups.dp_rank, identity(config, fingerprint(learner.prompts)))
            done = journal.replay(step)
            if run.groups.is_main:
                truncate_after(folder / TRAINED, step)
                trained = _count(folder / TRAINED)
        except (JournalError, OSError, RuntimeError) as error:
            failure = str(error)
    shares = run.groups.all_gather_object((failure, trained))
    for problem, _ in shares:
        if problem is not None:
            raise JournalError(problem)
    if done:
        steps = sorted({key.step for key in done})
        run.say(f"{len(done)} finished samples of steps {steps[0]} to {steps[-1]} are in the buffer")
    producer = None
    if journal is not None:
        assert learner.pool is not None
        tokenizer = learner.tokenizer
        producer = stack.enter_context(
            Producer(journal, learner.pool, lambda completion: completion_text(tokenizer, completion), done)
        )
    return Ahead(learner, engine, producer, folder, config.train.steps, trained=shares[0][1])


def _count(path: Path) -> int:
    """Samples in a list of what was trained on."""
    if not path.exists():
        return 0
    return sum(len(json.loads(line)["samples"]) for line in path.read_text().splitlines())
