"""Preference data from the model's own answers: sample, verify, chosen = a best one, rejected = a strictly worse one.

Work is done in chunks of prompts. Each finished chunk is a file beside the output, so that an interrupted run continues
after the last one, with any number of processes; at the end the chunks become the output, which appears whole or not at
all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import PreferConfig
from tulu_hpc.curation.preference import PreferenceStatistics, ScoredSample, binarise
from tulu_hpc.data.datasets import Prompt
from tulu_hpc.data.records import content_id, message_dicts
from tulu_hpc.data.rows import write_jsonl
from tulu_hpc.parallel.failures import shared_writing
from tulu_hpc.rollout.embedded import EmbeddedEngine
from tulu_hpc.rollout.engine import Request, Sampling
from tulu_hpc.rollout.sampling import derive_seed
from tulu_hpc.rollout.texts import completion_text, ended_itself
from tulu_hpc.stages.model_source import OpenModel, open_model
from tulu_hpc.stages.rollouts import (
    describe_lost,
    is_replica_leader,
    load_prompts,
    lost_verdicts,
    open_verifiers,
    refuse_stop_strings,
    sampling_of,
    verifier_record,
    verify_in_replica,
)
from tulu_hpc.stages.served_model import ServedModel, open_model_engine
from tulu_hpc.stages.step_files import check_files, outputs_of
from tulu_hpc.telemetry.files import write_atomically
from tulu_hpc.telemetry.progress import Progress
from tulu_hpc.verifiers.sandbox import VerifierPool

CHUNK_PROMPTS = 64  # per replica: little enough to lose, enough to decode in large batches


def run(config: PreferConfig) -> Path:
    """Write preference records to `prefer.output`, and `{output}.stats.json` beside them.

    Raises:
        ConfigError, RecordError, LayoutError: naming the key, file, line or rank.
        VerifierError: too many verdicts were lost.
    """
    check_files(config)
    if config.rollout.temperature == 0:
        raise ConfigError("rollout.temperature = 0: greedy answers to a prompt are all equal, there would be no pair")
    refuse_stop_strings(config.rollout, "data prefer")
    model = open_model(config.run, config.model, config.parallel, served=config.rollout.engine == "vllm")
    groups = model.groups
    output, statistics = outputs_of(config)
    prompts = load_prompts(config.data, config.verifier, model.tokenizer, lambda text: model.say(f"prefer: {text}"))
    prompts = _choose(prompts, config)
    identity = _identity(config, model, prompts)
    parts = output.with_name(output.name + ".parts")
    if groups.broadcast_object(_is_done(output, statistics, identity) if groups.is_main else None):
        model.say(f"prefer: nothing to do, {output} is complete")
        return output
    with shared_writing(groups, str(parts)):
        if groups.is_main:
            _open_parts(parts, identity)
    began = time.perf_counter()
    with ExitStack() as stack:
        pool = open_verifiers(config.verifier, groups, stack)
        logs, longest = (
            output.with_name(output.name + ".rollout"),
            config.data.max_length + config.rollout.max_new_tokens,
        )
        engine = open_model_engine(config.rollout, model, config.model, logs, longest, stack)
        sampling = sampling_of(config.rollout, model.tokenizer, model.source.base)
        done = groups.broadcast_object(_prompts_done(parts) if groups.is_main else None)
        if done:
            model.say(f"prefer: {done} of {len(prompts)} prompts were done before")
        progress = stack.enter_context(Progress("prefer", len(prompts), start=done, enabled=groups.is_main))
        while done < len(prompts):
            chunk = prompts[done : done + CHUNK_PROMPTS * groups.dp_size]
            rows = sample_chunk(config, model, engine, pool, sampling, chunk)
            with shared_writing(groups, str(parts)):
                if groups.is_main:
                    write_jsonl(parts / f"{done:09d}.jsonl", rows)
            done += len(chunk)
            progress.update(done, tokens=sum(row["new_tokens"] for row in rows))
        shares = groups.all_gather_object(pool.take_stats().as_dict() if pool else None)
    counts = [share for share in shares if share is not None]
    verdicts = lost_verdicts(counts, config.verifier.max_lost_share, "prefer")
    with shared_writing(groups, str(output)):
        if groups.is_main:
            _publish(config, model, parts, output, statistics, identity, verdicts, time.perf_counter() - began)
    return output


def sample_chunk(
    config: PreferConfig,
    model: OpenModel,
    engine: EmbeddedEngine | ServedModel,
    pool: VerifierPool | None,
    sampling: Sampling,
    chunk: Sequence[Prompt],
) -> list[dict[str, Any]]:
    """One row per prompt of the chunk, in order, on every process: the scored samples. Replicas share the prompts."""
    groups, count, seed = model.groups, config.prefer.samples_per_prompt, config.run.seed
    mine = chunk[groups.dp_rank :: groups.dp_size]
    requests = [
        Request(prompt.token_ids, sampling, derive_seed("prefer", seed, prompt.record.id, sample), prompt.record.id)
        for prompt in mine
        for sample in range(count)
    ]
    completions = engine.generate_batch(requests)
    texts = [completion_text(model.tokenizer, completion) for completion in completions]
    tasks = [(verifier_record(mine[index // count].record), text) for index, text in enumerate(texts)]
    verdicts = verify_in_replica(groups, pool, tasks)
    rows = []
    for index, prompt in enumerate(mine):
        own = range(index * count, (index + 1) * count)
        samples = [ScoredSample(texts[i], verdicts[i].score, ended_itself(completions[i])) for i in own]
        rows.append(
            {
                "id": prompt.record.id,
                "source": prompt.record.source,
                "messages": message_dicts(prompt.record.messages),
                "tools": list(prompt.record.tools),
                "samples": [asdict(sample) for sample in samples],
                "new_tokens": sum(len(completions[i].token_ids) for i in own),
            }
        )
    shares = groups.all_gather_object(rows if is_replica_leader(groups) else None)
    by_replica = [share for share in shares if share is not None]
    return [by_replica[number % groups.dp_size][number // groups.dp_size] for number in range(len(chunk))]


def _choose(prompts: list[Prompt], config: PreferConfig) -> list[Prompt]:
    """The first `prefer.prompts` of a seeded order (or of the file's, without data.shuffle), each prompt once."""
    unique = list({prompt.record.id: prompt for prompt in prompts}.values())
    if config.data.shuffle:
        unique.sort(key=lambda prompt: derive_seed("prefer order", config.run.seed, prompt.record.id))
    return unique[: config.prefer.prompts]


def _identity(config: PreferConfig, model: OpenModel, prompts: Sequence[Prompt]) -> str:
    """Identity of the result: what is sampled from what, and how."""
    return content_id(
        model.fingerprint,
        [prompt.record.id for prompt in prompts],
        config.prefer.samples_per_prompt,
        config.run.seed,
        config.rollout.model_dump(mode="json", exclude={"max_sequences", "vllm"}),
        config.verifier.rules,
        config.data.chat_template,
    )


def _is_done(output: Path, statistics: Path, identity: str) -> bool:
    if not output.is_file() or not statistics.is_file():
        return False
    return bool(json.loads(statistics.read_text(encoding="utf-8")).get("identity") == identity)


def _open_parts(parts: Path, identity: str) -> None:
    """Make the directory of chunks; chunks of other settings are thrown away.

    Raises:
        ConfigError: a directory of that name is there and holds something else.
    """
    mark = parts / "identity"
    if parts.is_dir() and not mark.is_file() and any(parts.iterdir()):
        raise ConfigError(f"prefer.output: {parts} is where unfinished work is kept, and holds something else")
    if parts.is_dir() and (not mark.is_file() or mark.read_text() != identity):
        shutil.rmtree(parts)
    if not parts.is_dir():
        parts.mkdir(parents=True)
        mark.write_text(identity)


def _part_rows(parts: Path) -> list[dict[str, Any]]:
    files = sorted(parts.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def _prompts_done(parts: Path) -> int:
    return len(_part_rows(parts))


def _publish(
    config: PreferConfig,
    model: OpenModel,
    parts: Path,
    output: Path,
    statistics: Path,
    identity: str,
    verdicts: dict[str, int],
    seconds: float,
) -> None:
    counts = PreferenceStatistics()
    records = []
    rows = _part_rows(parts)
    for row in rows:
        samples = [ScoredSample(**sample) for sample in row["samples"]]
        pair = binarise(samples, seed=derive_seed("pair", config.run.seed, row["id"]))
        counts.add(samples, pair, row["source"])
        if pair is not None:
            records.append(
                {
                    "prompt": row["messages"],
                    "chosen": [*row["messages"], {"role": "assistant", "content": pair.chosen.text}],
                    "rejected": [*row["messages"], {"role": "assistant", "content": pair.rejected.text}],
                    **({"tools": row["tools"]} if row["tools"] else {}),
                    "chosen_score": pair.chosen.score,
                    "rejected_score": pair.rejected.score,
                    "source": row["source"],
                    "prompt_id": row["id"],
                }
            )
    if not records:
        raise ValueError(
            f"{output}: no pair from {counts.prompts} prompts (mean score {counts.summary()['mean_score']:.2f}), "
            "each is always answered right or always wrong"
        )
    write_jsonl(output, records)
    summary = {
        "identity": identity,
        "model": {"path": config.model.path, "fingerprint": model.fingerprint},
        **counts.summary(),
        "samples_per_prompt": config.prefer.samples_per_prompt,
        "new_tokens": sum(row["new_tokens"] for row in rows),
        "seconds_of_last_start": round(seconds, 3),
        "config": config.model_dump(mode="json"),
        "verifier": verdicts,
    }
    write_atomically(statistics, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(parts)
    model.say(
        f"prefer: {counts.pairs} pairs from {counts.prompts} prompts "
        f"(mean score {counts.summary()['mean_score']:.3f}): {output}"
    )
    if lost := describe_lost(verdicts):
        model.say(f"prefer: {lost}, each scored 0")
