"""What the stages that sample share: prompts, sampling settings, verification inside a replica."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.sections import DataSection, RolloutSection, VerifierSection
from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.data.datasets import Counted, Prompt, rlvr_prompts
from tulu_hpc.data.records import RlvrRecord, read_records
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Sampling
from tulu_hpc.rollout.texts import stop_token_ids
from tulu_hpc.verifiers import Verdict, check_record
from tulu_hpc.verifiers.judge import JudgeSettings
from tulu_hpc.verifiers.sandbox import VerifierPool

VerifyTask = tuple[Mapping[str, Any], str]
LOSSES = ("timeouts", "crashes", "garbage", "errors")  # of PoolStats: verdicts that scored 0 for want of one


def verifier_record(record: RlvrRecord) -> dict[str, Any]:
    """The mapping that verifiers read."""
    return {"dataset": record.dataset, "ground_truth": record.ground_truth}


class VerifierError(RuntimeError):
    """So many verdicts were lost that the scores would say more about the verifiers than about the model."""


def import_verifiers(verifier: VerifierSection) -> None:
    """Import `verifier.modules` here only to know the names they register; they run in the workers.

    Raises:
        ConfigError: a module cannot be imported.
    """
    for module in verifier.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"verifier.modules: {module}: {error}") from error


def open_verifiers(verifier: VerifierSection, groups: Groups, stack: ExitStack) -> VerifierPool | None:
    """The pool of a replica, on its leader (None elsewhere); its workers end with `stack`."""
    if not is_replica_leader(groups):
        return None
    pool = VerifierPool(
        verifier.workers,
        verifier.timeout_seconds,
        rules=verifier.rules,
        modules=verifier.modules,
        grants=verifier.grants,
        judge=JudgeSettings(**verifier.judge.model_dump()) if verifier.judge else None,
        cache=verifier.cache,
        cache_folder=verifier.cache_dir,
    )
    return stack.enter_context(pool)


def lost_verdicts(parts: Sequence[Mapping[str, int]], max_share: float, where: str) -> dict[str, int]:
    """Counts of all replicas' pools added up; the same on every process.

    Raises:
        VerifierError: more than `max_share` of the verdicts were lost (each scored 0).
    """
    counts = {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}
    lost = {name: counts[name] for name in LOSSES if counts.get(name)}
    if counts and sum(lost.values()) > max_share * counts["verdicts"]:
        raise VerifierError(
            f"{where}: {sum(lost.values())} of {counts['verdicts']} verdicts were lost ({_listed(lost)}), more than "
            f"verifier.max_lost_share = {max_share:g}: check verifier.modules, verifier.timeout_seconds and the data"
        )
    return counts


def describe_lost(counts: Mapping[str, int]) -> str:
    """`3 of 40 verdicts lost (timeouts 2, errors 1)`, or nothing when none was."""
    lost = {name: counts[name] for name in LOSSES if counts.get(name)}
    return f"{sum(lost.values())} of {counts['verdicts']} verdicts lost ({_listed(lost)})" if lost else ""


def _listed(lost: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in lost.items())


def refuse_stop_strings(rollout: RolloutSection, verb: str) -> None:
    """An answer that a stop string ended has no end-of-text: it would count as unfinished and score nothing.

    Raises:
        ConfigError: there are stop strings.
    """
    if rollout.stop:
        raise ConfigError(
            f"rollout.stop = {rollout.stop}: for {verb} an answer must end with end-of-text; stop strings are for eval"
        )


def load_prompts(
    data: DataSection, verifier: VerifierSection, tokenizer: Any, say: Callable[[str], None]
) -> list[Prompt]:
    """Prompts of all files of `data.path`, every one with verifiers that exist and a ground truth that they can use.

    Raises:
        ConfigError: a module of verifier.modules cannot be imported.
        RecordError: a row that cannot be read or verified, with file, line and field (unless data.on_error is skip).
        ValueError: no prompt is left.
    """
    import_verifiers(verifier)
    template = ChatTemplate.load(data.chat_template, tokenizer)

    def verifiable(record: RlvrRecord) -> None:
        check_record(verifier_record(record), verifier.rules, verifier.grants)

    prompts: list[Prompt] = []
    for path in data.path:
        records = read_records(path, "rlvr", on_error=data.on_error, check=verifiable)
        found: Counted[Prompt] = rlvr_prompts(records, tokenizer, template, data.max_length, on_error=data.on_error)
        prompts += found
        problems = records.skipped
        refused = f", {len(problems)} unusable rows left out, the first: {problems[0]}" if problems else ""
        say(f"{path}: {found.summary()}{refused}")
    if not prompts:
        raise ValueError(f"data.path {data.path}: no prompt of at most {data.max_length} tokens")
    return prompts


def sampling_of(rollout: RolloutSection, tokenizer: Any, model_path: str | Path) -> Sampling:
    """The configuration's sampling with the model's end-of-text tokens."""
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        stop_token_ids=stop_token_ids(tokenizer, model_path),
        stop_strings=tuple(rollout.stop),
    )


def open_engine(
    rollout: RolloutSection, chunks: list[Any], groups: Groups, architecture: Architecture, tokenizer: Any
) -> EmbeddedEngine:
    """The embedded engine on this model."""
    return EmbeddedEngine(chunks, groups, architecture, tokenizer, rollout.max_sequences)


def say_incidents(groups: Groups, incidents: Sequence[str], say: Callable[[str], None]) -> None:
    """Print what went wrong at the engines and was made good, of all ranks. Collective."""
    for found in groups.all_gather_object(list(incidents)):
        for incident in found:
            say(f"rollout: {incident}")


def is_replica_leader(groups: Groups) -> bool:
    """Whether this process speaks for its model replica."""
    return groups.tp_rank == 0 and groups.pp_rank == 0 and groups.cp_rank == 0


def broadcast_in_replica(groups: Groups, value: Any) -> Any:
    """The leader's value on every process of the replica (pickled)."""
    device = default_device()
    for group in (groups.pg.cp, groups.pg.mp):  # the leader's context-parallel group first, then every tp x pp block
        if group.size() > 1:
            box = [value]
            dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group, device=device)
            value = box[0]
    return value


def verify_in_replica(groups: Groups, pool: VerifierPool | None, tasks: Sequence[VerifyTask]) -> list[Verdict]:
    """Verdicts from the leader's pool, on every process of the replica: a timeout must not split them."""
    verdicts = None
    if is_replica_leader(groups):
        assert pool is not None
        verdicts = pool.verify_batch(tasks)
    return list(broadcast_in_replica(groups, verdicts))
