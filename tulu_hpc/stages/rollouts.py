"""What the stages that sample share: prompts, sampling settings, verification inside a replica."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import DataSection, RolloutSection, VerifierSection
from tulu_hpc.data.chat_template import ChatTemplate
from tulu_hpc.data.datasets import Counted, Prompt, rlvr_prompts
from tulu_hpc.data.records import RlvrRecord, read_records
from tulu_hpc.parallel.device import default_device
from tulu_hpc.parallel.layout import Groups
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Sampling
from tulu_hpc.rollout.texts import stop_token_ids
from tulu_hpc.verifiers import Verdict, check_record
from tulu_hpc.verifiers.sandbox import VerifierPool

VerifyTask = tuple[Mapping[str, Any], str]
ENGINES = {"embedded": EmbeddedEngine}  # by rollout.engine


def verifier_record(record: RlvrRecord) -> dict[str, Any]:
    """The mapping that verifiers read."""
    return {"dataset": record.dataset, "ground_truth": record.ground_truth}


def load_prompts(
    data: DataSection, verifier: VerifierSection, tokenizer: Any, say: Callable[[str], None]
) -> list[Prompt]:
    """Prompts of all files of `data.path`, every one with verifiers that exist and a ground truth that they can use.

    Raises:
        ConfigError: a module of verifier.modules cannot be imported.
        RecordError: a row that cannot be read or verified, with file, line and field (unless data.on_error is skip).
        ValueError: no prompt is left.
    """
    for module in verifier.modules:  # here only to know their names; they run in the workers
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"verifier.modules: {module}: {error}") from error
    template = ChatTemplate.load(data.chat_template, tokenizer)

    def verifiable(record: RlvrRecord) -> None:
        check_record(verifier_record(record), verifier.rules)

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
    """The engine that `rollout.engine` names, on this model."""
    return ENGINES[rollout.engine](chunks, groups, architecture, tokenizer, rollout.max_sequences)


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
