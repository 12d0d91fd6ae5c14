"""Generation and verification beside training: the threads of one replica's leader. Nothing here is collective.

    wanted requests -> a thread per batch of them, asking the servers -> finished answers -> the verifier's thread:
    verdicts, the journal (synced to disk) -> finished samples

The trainer's thread says what it wants, starts batches, waits for samples, and hears of failures when it waits.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tulu_hpc.rollout.engine import Completion, EngineError, Request, ServersLostError
from tulu_hpc.rollout.vllm import VllmEngine
from tulu_hpc.stages.rlvr_buffer import Journal, Sample, SampleKey
from tulu_hpc.verifiers import Verdict
from tulu_hpc.verifiers.sandbox import VerifierPool, loss_of


class ProducerError(RuntimeError):
    """Generation or verification in the background has failed; says why."""


@dataclass(frozen=True)
class Job:
    """A sample to make: the request, and what its answer is verified against."""

    key: SampleKey
    prompt: str  # id of the record
    request: Request
    record: Mapping[str, Any]


@dataclass
class _Batch:
    """Requests that are with the servers; `loop` and `task` are there while they are."""

    jobs: list[Job]
    client: VllmEngine
    answered: set[SampleKey] = field(default_factory=set)
    thread: threading.Thread | None = None
    loop: asyncio.AbstractEventLoop | None = None
    task: asyncio.Task[Any] | None = None


class Producer:
    """Makes the samples it is asked for, once each; a context manager that ends its threads.

    Args:
        journal: where every finished sample is noted before anybody hears of it.
        pool: used by the verifier's thread alone from here on.
        text_of: the text of an answer that is verified.
        done: samples that an earlier process finished.
    """

    def __init__(
        self,
        journal: Journal,
        pool: VerifierPool,
        text_of: Callable[[Completion], str],
        done: Mapping[SampleKey, Sample],
    ) -> None:
        self._journal, self._pool, self._text_of = journal, pool, text_of
        self._done = dict(done)
        self._wanted: dict[SampleKey, Job] = {}  # neither with the servers nor done
        self._busy: dict[SampleKey, Job] = {}
        self._batches: list[_Batch] = []
        self._failure: str | None = None
        self._lost: str | None = None
        self._closing = False
        self._change = threading.Condition()
        self._answers: queue.SimpleQueue[tuple[Job, Completion] | None] = queue.SimpleQueue()
        # It outlives every batch, because the pool's workers die with the thread that started them.
        self._verifier = threading.Thread(target=self._verify_all, name="verifier", daemon=True)

    def __enter__(self) -> Self:
        self._verifier.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up what is with the servers; answers that have come are still verified and noted."""
        with self._change:
            self._closing = True
            batches = list(self._batches)
            for batch in batches:
                _cancel(batch)
        for batch in batches:
            assert batch.thread is not None
            batch.thread.join()
        self._answers.put(None)
        self._verifier.join()
        self._journal.close()

    # What the trainer's thread calls

    def want(self, jobs: Iterable[Job]) -> None:
        """Ask for samples; those that are there, wanted or on their way are not made again.

        Raises:
            ProducerError: a sample of the buffer answers another prompt.
        """
        with self._change:
            for job in jobs:
                done = self._done.get(job.key)
                if done is None and job.key not in self._busy:
                    self._wanted[job.key] = job
                elif done is not None and done.prompt != job.prompt:
                    raise ProducerError(f"{job.key} of the buffer answers {done.prompt}, not {job.prompt}")

    def start(self, client: VllmEngine) -> None:
        """Send all that is wanted to the servers.

        Args:
            client: of its own, not used elsewhere.
        """
        with self._change:
            jobs, self._wanted, self._lost = list(self._wanted.values()), {}, None
            if not jobs:
                return
            self._busy |= {job.key: job for job in jobs}
            batch = _Batch(jobs, client)
            batch.thread = threading.Thread(target=self._generate, args=(batch,), name="rollouts", daemon=True)
            self._batches.append(batch)
            batch.thread.start()

    def wait(self, keys: Collection[SampleKey] | None = None) -> str | None:
        """Until these samples (None: all that were asked for) are done, or cannot be before another `start`.

        Returns:
            None, or how the servers were lost on the way.

        Raises:
            ProducerError: something failed.
        """
        with self._change:
            while self._failure is None:
                missing = [key for key in (self._busy if keys is None else keys) if key not in self._done]
                if not missing or not any(key in self._busy for key in missing):
                    return self._lost if keys is None or missing else None
                self._change.wait()
            raise ProducerError(self._failure)

    def samples(self, keys: Sequence[SampleKey]) -> list[Sample]:
        """Finished samples, in the order of their keys."""
        with self._change:
            return [self._done[key] for key in keys]

    @property
    def busy(self) -> int:
        """Samples that are with the servers or the verifier."""
        with self._change:
            return len(self._busy)

    def some(self, step: int, count: int) -> list[Sample]:
        """Finished samples of a step, of different prompts and its first round, in the order of the prompts."""
        with self._change:
            return [self._done[key] for key in sorted(self._done) if key[:2] == (step, 0) and key.sample == 0][:count]

    def forget(self, up_to: int) -> None:
        """Drop the samples of steps that are trained from memory."""
        with self._change:
            for key in [key for key in self._done if key.step <= up_to]:
                del self._done[key]

    def drop(self, jobs: Sequence[Job]) -> None:
        """Take finished samples back and want them anew.

        Raises:
            ProducerError: this could not be noted.
        """
        with self._change:
            try:
                self._journal.drop(job.key for job in jobs)
            except OSError as error:
                raise ProducerError(f"the buffer cannot be written: {error}") from error
            for job in jobs:
                del self._done[job.key]
                self._wanted[job.key] = job

    def set_updating(self, updating: bool) -> None:
        """While the servers are sent weights they are not asked whether they live."""
        with self._change:
            for batch in self._batches:
                batch.client.updating = updating

    # The threads

    def _generate(self, batch: _Batch) -> None:
        failure, lost = None, None
        try:
            asyncio.run(self._ask(batch))
        except ServersLostError as error:
            lost = str(error)
        except asyncio.CancelledError:
            pass
        except (EngineError, ValueError, OSError) as error:
            failure = str(error)
        except BaseException as error:  # a thread that dies in silence would leave the trainer waiting
            failure = repr(error)
        with self._change:
            self._batches.remove(batch)
            self._failure, self._lost = self._failure or failure, self._lost or lost
            for job in batch.jobs:
                if job.key not in batch.answered:  # those that are answered stay busy until they are verified
                    self._wanted[job.key] = self._busy.pop(job.key)
            self._change.notify_all()

    async def _ask(self, batch: _Batch) -> None:
        with self._change:
            batch.loop, batch.task = asyncio.get_running_loop(), asyncio.current_task()
            if self._closing:
                return

        def finished(place: int, completion: Completion) -> None:
            batch.answered.add(batch.jobs[place].key)
            self._answers.put((batch.jobs[place], completion))

        try:
            await batch.client.generate([job.request for job in batch.jobs], finished)
        finally:
            with self._change:
                batch.loop = batch.task = None

    def _verify_all(self) -> None:
        try:
            ended = False
            while not ended:
                answers = [self._answers.get()]
                while not self._answers.empty():  # all that has come meanwhile is one batch and one sync to disk
                    answers.append(self._answers.get())
                ended = None in answers
                self._finish([answer for answer in answers if answer is not None])
        except BaseException as error:
            with self._change:
                self._failure = self._failure or f"{type(error).__name__}: {error}"
                self._change.notify_all()

    def _finish(self, answers: Sequence[tuple[Job, Completion]]) -> None:
        tasks = [(job.record, self._text_of(completion)) for job, completion in answers]
        samples = [
            Sample(job.key, job.prompt, completion, verdict.score, verdict.reason)
            for (job, completion), verdict in zip(answers, self._verdicts(tasks), strict=True)
        ]
        self._journal.append(samples)
        with self._change:
            for sample in samples:
                self._done[sample.key] = sample
                self._busy.pop(sample.key, None)
            self._change.notify_all()

    def _verdicts(self, tasks: Sequence[tuple[Mapping[str, Any], str]]) -> list[Verdict]:
        """Verdicts; what a worker that was killed owed is asked for once more (an answer that kills it kills two)."""
        verdicts = self._pool.verify_batch(tasks)
        again = [place for place, verdict in enumerate(verdicts) if loss_of(verdict.reason) == "crashes"]
        for place in again:
            verdicts[place] = self._pool.verify_batch([tasks[place]])[0]
        return verdicts


def _cancel(batch: _Batch) -> None:
    if batch.loop is not None and batch.task is not None:
        batch.loop.call_soon_threadsafe(batch.task.cancel)
