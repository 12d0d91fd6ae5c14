"""The mismatch gate: nothing is learned from samples whose log-probs the trainer cannot reproduce."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.loader import pack_items
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence
from tulu_hpc.rollout.engine import Request
from tulu_hpc.rollout.sampling import derive_seed
from tulu_hpc.rollout.weight_checksums import Checksums, compared, first_difference, weight_checksums
from tulu_hpc.stages.rlvr_learner import Learner
from tulu_hpc.stages.rlvr_mismatch import Mismatch, MismatchError, breach, places
from tulu_hpc.stages.rollouts import is_replica_leader
from tulu_hpc.stages.served import ServedEngine
from tulu_hpc.training.runner import row_multiple

# In fp32 engine and trainer compute the same function: a larger difference of log-probs means that one is wrong.
FLOAT32_LIMIT = 1e-3
_PROBED_PROMPTS = 8


def check_first(learner: Learner, step: int, minibatches: Sequence[Sequence[PackedBatch]]) -> None:
    """Compare before anything is trained, at the price of a forward pass; fp32 only, where the answer is exact.

    Raises:
        MismatchError: see `require_match`.
    """
    if learner.config.model.dtype != "float32":
        return
    columns = [[each.cpu() for each in learner.trainer.runner.logprobs(packs)] for packs in minibatches]
    require_match(learner, step, _compare(learner, minibatches, columns), trained=False)


def check_own(learner: Learner, step: int, minibatches: Sequence[Sequence[PackedBatch]]) -> Mismatch:
    """The same on the column `old_logprobs`, which costs nothing; what was found, on the leader of each replica.

    Raises:
        MismatchError: see `require_match`.
    """
    columns = [[pack.per_target["old_logprobs"] for pack in packs] for packs in minibatches]
    mismatch = _compare(learner, minibatches, columns)
    require_match(learner, step, mismatch, trained=False)
    return mismatch


def check_scores(learner: Learner, step: int, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Mismatch:
    """Compare on given (prompt, answer) token ids, which the engine scores with the weights that it has just been sent.

    For samples that older weights drew: their own log-probs say nothing about the weights of today. Collective.

    Returns:
        What was found, on the main process.

    Raises:
        MismatchError: see `require_match`.
    """
    engine = learner.engine
    assert isinstance(engine, ServedEngine)
    mismatch = Mismatch()
    scored = engine.score([[*prompt, *answer] for prompt, answer in answers])
    prompts = [torch.tensor(prompt) for prompt, _ in answers]
    ours = _trainer_logprobs(learner, prompts, [torch.tensor(answer) for _, answer in answers], temperature=1.0)
    if learner.run.groups.is_main:
        rows = [torch.tensor(row)[len(prompt) - 1 :] for row, prompt in zip(scored, prompts, strict=True)]
        mismatch.add(ours, torch.cat(rows))
    require_match(learner, step, mismatch, trained=False)
    return mismatch


def _compare(
    learner: Learner, minibatches: Sequence[Sequence[PackedBatch]], columns: Sequence[Sequence[Tensor]]
) -> Mismatch:
    """Of whole packs, which every rank of a replica has: the leader counts them."""
    mismatch = Mismatch()
    if is_replica_leader(learner.run.groups):
        for packs, columns_K in zip(minibatches, columns, strict=True):
            for pack, logprobs_K in zip(packs, columns_K, strict=True):
                mismatch.add(logprobs_K, pack.per_target["behaviour_logprobs"], places(pack))
    return mismatch


def require_match(learner: Learner, step: int, mismatch: Mismatch, *, trained: bool) -> None:
    """Stop the run on a breach, with a verdict where the engine has weights of its own. Collective.

    Args:
        trained: the weights have changed since the comparison.

    Raises:
        MismatchError: on every rank.
    """
    config = learner.config
    found = breach(
        learner.run.groups.all_gather_object(mismatch), _limit(config), config.rollout.mismatch_mult_prob_error
    )
    if found is None:
        return
    engine = learner.engine
    verdict = f": {diagnose(learner, engine, trained=trained)}" if isinstance(engine, ServedEngine) else ""
    consequence = "the step was trained, but is not saved" if trained else "nothing was trained"
    raise MismatchError(
        f"step {step}: the rollout engine's log-probs differ from the trainer's {found}, with the same weights; "
        f"{consequence}{verdict}"
    )


def _limit(config: RlvrConfig) -> float | None:
    if config.rollout.mismatch_max is not None:
        return config.rollout.mismatch_max
    return FLOAT32_LIMIT if config.model.dtype == "float32" else None


def diagnose(learner: Learner, engine: ServedEngine, *, trained: bool) -> str:
    """Repeat the comparison with weights sent anew, once on fresh samples and once on scores. Collective.

    The engine's checksums changed, or sampling agrees now: the samples were drawn with other weights. Only scoring
    agrees: what the engine reports when it samples is of another distribution. Neither: the two compute different
    functions.
    """
    config = learner.config
    # After training the engine is sent other weights than it should have had, so checksums say nothing.
    before = {} if trained else _checksums(learner, engine)
    engine.send_weights()
    after = {} if trained else _checksums(learner, engine)
    difference = first_difference(before, after)
    if difference is not None:
        return f"WEIGHTS: the engine held others than the trainer's; sent anew, {difference}"
    count = compared(before, after)
    held = f" (the checksums of {count} of its tensors were right)" if count else ""
    requests = [
        Request(prompt.token_ids, learner.sampling, derive_seed("diagnose", config.run.seed, number), str(number))
        for number, prompt in enumerate(learner.prompts[:_PROBED_PROMPTS])
    ]
    completions = engine.generate_batch(requests)
    prompts = [torch.tensor(request.token_ids) for request in requests]
    answers = [torch.tensor(completion.token_ids) for completion in completions]
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    scored = engine.score([torch.cat(pair).tolist() for pair in zip(prompts, answers, strict=True)])
    untempered = torch.cat(
        [torch.tensor(each)[len(prompt) - 1 :] for each, prompt in zip(scored, prompts, strict=True)]
    )
    parts = []
    for temperature, theirs in ((config.rollout.temperature, sampled), (1.0, untempered)):
        part = Mismatch()
        part.add(_trainer_logprobs(learner, prompts, answers, temperature), theirs)
        parts.append(part)
    limits = (_limit(config), config.rollout.mismatch_mult_prob_error)
    largest = [f"{part.largest:.2g}" for part in parts]
    if breach(parts[:1], *limits) is None:
        return f"WEIGHTS: sent anew they agree (to {largest[0]}), so the samples were drawn with other weights{held}"
    if breach(parts[1:], *limits) is None:
        return (
            f"SAMPLING TRANSFORM: with the weights sent anew the engine scores tokens as the trainer does (to "
            f"{largest[1]}){held}, but samples with log-probs that differ by {largest[0]}: compare temperature, top_p "
            f"and --logprobs-mode"
        )
    return (
        f"KERNEL NUMERICS: with the weights sent anew sampled ({largest[0]}) and scored ({largest[1]}) log-probs both "
        f"differ{held}: the engine computes another function (dtype, rope, attention or norm kernels)"
    )


def _checksums(learner: Learner, engine: ServedEngine) -> dict[str, Checksums]:
    """Of the servers that serve, on every rank. Collective."""
    groups = learner.run.groups
    found = None
    if groups.is_main:
        found = asyncio.run(weight_checksums([address for address, _ in engine.client.serving()]))
    return dict(groups.broadcast_object(found))


def _trainer_logprobs(
    learner: Learner, prompts: Sequence[Tensor], answers: Sequence[Tensor], temperature: float
) -> Tensor:
    """Of all answers' tokens, one after another. Packs keep neither order nor place, so each answer is alone in one."""
    config = learner.config
    packs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        packs += pack_items(
            [Item("group", [TokenSequence(answer)], prompt=prompt)],
            capacity=config.train.pack_rows,
            multiple=row_multiple(learner.run.groups.layout, config.parallel.context_split),
            share=config.train.prefix_sharing,
            pad_id=learner.pad_id,
        )
    models = learner.trainer.models
    for model in models:
        model.logprob_temperature = temperature
    try:
        return torch.cat([each.cpu() for each in learner.trainer.runner.logprobs(packs)])
    finally:
        for model in models:
            model.logprob_temperature = config.rollout.temperature
