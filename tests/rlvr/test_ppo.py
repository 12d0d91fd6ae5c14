"""PPO: a whole step against plain fp64 torch on transformers' models, at any pair of layouts, resumed and killed.

Not proven here: that rewards of a real task rise (configs/quickstart/ppo.yaml is for that), and anything on GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.parallel.forked import WorkerError, run_forked
from tests.rlvr import tiny_ppo
from tests.rlvr.tiny_ppo import ppo_config
from tests.rlvr.tiny_rlvr import in_processes, metrics, run_and_die, same_metrics
from tests.training import tiny
from tests.training.killed_runs import kill_at_random
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.data.packed_batch import Item, PackedBatch, TokenSequence, pack
from tulu_hpc.data.readout import with_readout
from tulu_hpc.data.tokenizer import load_tokenizer, train_tokenizer
from tulu_hpc.models.convert import iter_hf_tensors
from tulu_hpc.stages import rlvr, rlvr_sampling, rlvr_step, rlvr_values, training_run
from tulu_hpc.training.step import StepResult, train_step
from tulu_hpc.training.trainer import Trainer

TEMPERATURE, NO_EOS, COEF, VALUE_CLIP = 0.9, -10.0, 0.1, 0.2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent do not survive a fork
    return tiny_ppo.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    in_processes(rlvr.run, ppo_config(inputs, run))
    return run


# ------------------------------------------------------------------------------------------------ the numbers of a step
def _perturb(models: Sequence[Any], scale: float) -> None:
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.mul_(1 + scale * torch.randn_like(parameter))


def _whole_weights(models: Sequence[Any], trainer: Trainer) -> dict[str, Tensor]:
    stream = iter_hf_tensors(models, trainer.architecture, trainer.groups)
    return {name: tensor.clone() for name, tensor in stream if tensor is not None}


def _watched_step(config: RlvrConfig) -> dict[str, Any]:
    """A first step; before the first update of either model its weights are changed, as earlier minibatches would, and
    loss and gradient taken."""
    seen: dict[str, Any] = {}
    score, build = rlvr_sampling.score_rollouts, rlvr.build

    def watched_build(*arguments: Any) -> Any:
        learner = build(*arguments)
        torch.manual_seed(11)
        assert learner.reference is not None and learner.value is not None
        _perturb(learner.reference.chunks, 0.2)
        seen["reference"] = _whole_weights(learner.reference.chunks, learner.trainer)
        return learner

    def watched_score(*arguments: Any) -> Any:
        seen["groups"] = score(*arguments)
        return seen["groups"]

    def watch(name: str) -> Callable[..., StepResult]:
        def step(trainer: Trainer, packs: Sequence[PackedBatch], loss_fn: Any, **options: Any) -> StepResult:
            if name not in seen:
                _perturb(trainer.models, 0.1 if name == "policy" else 0.4)
                trainer.zero_grad()
                terms = trainer.runner.forward_backward(trainer.runner.prepare(packs), loss_fn)
                seen[name] = {
                    "weights": _whole_weights(trainer.models, trainer),
                    "gradients": tiny.gradients(trainer),
                    "loss": sum(float(each.loss) for each in terms),
                }
                columns = ("advantages",) if name == "policy" else ("old_values", "returns")
                seen.update({column: _by_sample(packs, column) for column in columns})
            return train_step(trainer, packs, loss_fn, **options)

        return step

    rlvr.build, rlvr_sampling.score_rollouts = watched_build, watched_score
    rlvr_step.train_step, rlvr_values.train_step = watch("policy"), watch("value")
    rlvr.run(config)
    return seen


def _by_sample(packs: Sequence[PackedBatch], column: str) -> dict[int, list[float]]:
    parts = [rlvr_values.by_sample(pack, pack.per_target[column]) for pack in packs]
    return {sample: values.tolist() for part in parts for sample, values in part.items()}


def _logprobs(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def _values(model: LlamaForSequenceClassification, prompt: list[int], answer: list[int]) -> Tensor:
    hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state[0]
    return model.score(hidden)[len(prompt) - 1 : -1, 0]


def _estimate(kind: str, d: Tensor) -> Tensor:
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]


def _double(folder: Path, kind: Any, weights: dict[str, Tensor] | None = None) -> Any:
    model = kind.from_pretrained(folder, dtype=torch.float64)
    if weights is not None:
        missing, unexpected = model.load_state_dict({k: v.double() for k, v in weights.items()}, strict=False)
        assert not missing and not unexpected
    return model


def _close(found: dict[str, Tensor], model: torch.nn.Module) -> None:
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None
        assert float((found[name] - gradient).abs().max() / gradient.abs().max()) < 2e-5, name


@pytest.mark.parametrize(
    ("kl_in", "kl_kind", "old", "samples"),
    [("reward", "k1", "trainer", 1), ("reward", "k3", "engine", 2), ("loss", "k2", "engine", 1)],
)
def test_a_whole_step_in_plain_torch(
    inputs: Path, tmp_path: Path, kl_in: str, kl_kind: str, old: str, samples: int
) -> None:
    changes = {"kl_in": kl_in, "kl_kind": kl_kind, "old_logprobs": old, "samples_per_prompt": samples, "kl_coef": 0.3}
    config = ppo_config(
        inputs,
        tmp_path / "run",
        train__steps=1,
        rollout__mismatch_max=1e9,  # the weights are changed between sampling and the first update
        rollout__mismatch_mult_prob_error=1e9,
        **{f"rlvr__{name}": value for name, value in changes.items()},
    )
    seen = run_forked(1, _watched_step, config)[0]
    policy, reference = (_double(inputs / "model", LlamaForCausalLM, w) for w in (None, seen["reference"]))
    changed = _double(inputs / "model", LlamaForCausalLM, seen["policy"]["weights"])
    value = _double(inputs / "rm", LlamaForSequenceClassification)
    changed_value = _double(inputs / "rm", LlamaForSequenceClassification, seen["value"]["weights"])
    eos = load_tokenizer(inputs / "model").eos_token_id

    answers: dict[int, dict[str, Any]] = {}
    for group in seen["groups"]:
        for index, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True)):
            ids = (list(group.prompt.token_ids), completion.token_ids)
            if completion.token_ids[-1] != eos:
                assert reward == NO_EOS
            with torch.no_grad():
                old_logprobs, wanted = _logprobs(policy, *ids), _logprobs(reference, *ids)
                rewards = torch.zeros(len(old_logprobs), dtype=torch.float64)
                if kl_in == "reward":
                    rewards -= 0.3 * _estimate(kl_kind, old_logprobs - wanted)
                rewards[-1] += reward
                values = _values(value, *ids)
            advantages, following, running = torch.zeros_like(values), 0.0, 0.0
            for t in reversed(range(len(values))):
                running = float(rewards[t] + following - values[t]) + 0.95 * running
                advantages[t], following = running, float(values[t])
            answers[group.number * samples + index] = {
                "ids": ids, "old": old_logprobs, "reference": wanted, "values": values, "advantages": advantages,
                "returns": advantages + values, "minibatch": group.number * 2 // 10,
            }  # fmt: skip
    assert any(len(a["ids"][1]) > 1 for a in answers.values())
    everything = torch.cat([answer["advantages"] for answer in answers.values()])
    mean, deviation = everything.mean(), torch.sqrt(everything.var() + 1e-8)

    first = {number: answer for number, answer in answers.items() if answer["minibatch"] == 0}
    assert seen["advantages"].keys() == seen["returns"].keys() == first.keys()
    policy_losses, value_losses = [], []
    clipped = torch.zeros(2)
    for number, answer in first.items():
        white = (answer["advantages"] - mean) / deviation
        assert seen["advantages"][number] == pytest.approx(white.tolist(), abs=1e-5)
        assert seen["returns"][number] == pytest.approx(answer["returns"].tolist(), abs=1e-5)
        assert seen["old_values"][number] == pytest.approx(answer["values"].tolist(), abs=1e-6)
        logprobs, values = _logprobs(changed, *answer["ids"]), _values(changed_value, *answer["ids"])
        ratio = torch.exp(logprobs - answer["old"])
        loss = torch.maximum(-white * ratio, -white * ratio.clamp(0.8, 1.2))
        if kl_in == "loss":
            loss = loss + 0.3 * _estimate(kl_kind, logprobs - answer["reference"])
        policy_losses.append(loss)
        moved = answer["values"] + (values - answer["values"]).clamp(-VALUE_CLIP, VALUE_CLIP)
        value_losses.append(torch.maximum((values - answer["returns"]) ** 2, (moved - answer["returns"]) ** 2) / 2)
        far = (values - answer["values"]).abs() > VALUE_CLIP
        clipped += torch.stack((((ratio - 1).abs() > 0.2).sum(), far.sum()))
    assert (clipped > 0).all(), "a clip was not tried"
    for found, losses, coef, model in (
        (seen["policy"], policy_losses, 1.0, changed),
        (seen["value"], value_losses, COEF, changed_value),
    ):
        loss = coef * torch.cat(losses).mean()
        loss.backward()
        assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
        _close(found["gradients"], model)


# ------------------------------------------------------------------------------------------------ layouts
def _advantages_of(config: RlvrConfig) -> list[tuple[int, int, list[float]]]:
    """(optimizer step, sample, advantages) of this process's answers, in a whole run."""
    collected = []

    def step(trainer: Trainer, packs: Sequence[PackedBatch], loss_fn: Any, **options: Any) -> StepResult:
        for sample, values in _by_sample(packs, "advantages").items():
            collected.append((trainer.step, sample, values))
        return train_step(trainer, packs, loss_fn, **options)

    rlvr_step.train_step = step
    rlvr.run(config)
    return collected


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[int, int], list[float]]]:
    run = tmp_path_factory.mktemp("alone") / "run"
    parts = run_forked(1, _advantages_of, ppo_config(inputs, run, train__steps=2, train__save_every=None))
    return run, {(step, sample): values for step, sample, values in parts[0]}


@pytest.mark.parametrize(
    ("world", "policy", "value"),
    [
        (4, {"parallel__tensor": 2}, {}),  # tp2 x dp2 and dp4
        (2, {}, {"tensor": 2}),
        (2, {"parallel__tensor": 2, "parallel__sequence": False}, {"pipeline": 2}),
        (2, {"parallel__pipeline": 2}, {"context": 2}),
        (2, {}, None),
    ],
)
def test_layouts_of_policy_and_value_do_not_change_a_run(
    inputs: Path,
    alone: tuple[Path, dict[tuple[int, int], list[float]]],
    tmp_path: Path,
    world: int,
    policy: dict[str, Any],
    value: dict[str, Any] | None,
) -> None:
    config = ppo_config(
        inputs, tmp_path / "run", train__steps=2, train__save_every=None, value__parallel=value, **policy
    )
    parts = run_forked(world, _advantages_of, config)
    run, wanted = alone
    found = {(step, sample): values for part in parts for step, sample, values in part}
    assert found.keys() == wanted.keys()
    for (step, sample), values in wanted.items():
        # From the fifth update on the models have drifted apart by the rounding of Adam's first steps.
        assert found[step, sample] == pytest.approx(values, abs=1e-5 if step < 4 else 1e-3), (step, sample)
    for step, (mine, theirs) in enumerate(zip(metrics(tmp_path / "run"), metrics(run), strict=True)):
        assert mine["rollout/reward"] == theirs["rollout/reward"]
        for name in (
            *("train/loss", "train/grad_norm", "train/clip_fraction", "train/kl", "value/loss", "value/grad_norm"),
            *("value/mean", "value/explained_variance", "advantages/mean", "advantages/std", "returns/std"),
            *("rewards/kl", "rewards/kl_penalty"),
        ):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5 if step == 0 else 1e-3, abs=1e-5), name


# ------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize(
    ("world", "changes"), [(1, {}), (2, {"parallel__tensor": 2, "value__parallel": {"tensor": 1}})]
)
def test_resumed_run_equals_the_uninterrupted_one(
    inputs: Path, whole: Path, tmp_path: Path, world: int, changes: dict[str, Any]
) -> None:
    if world > 1:
        whole = tmp_path / "whole"
        in_processes(rlvr.run, ppo_config(inputs, whole, **changes), world)
    config = ppo_config(inputs, tmp_path / "run", **changes)
    with pytest.raises(WorkerError, match="Stopped"):
        in_processes(lambda _config: run_and_die(rlvr.run, _config, 3), config, world)
    in_processes(rlvr.run, config, world)
    assert same_metrics(tmp_path / "run") == same_metrics(whole)
    for name in ("", "value"):
        files = sorted((whole / "checkpoints" / "step_16" / name).glob("*.distcp"))
        assert len(files) == world
        for file in files:
            assert file.read_bytes() == (tmp_path / "run" / file.relative_to(whole)).read_bytes()


def test_killed_runs_end_like_the_whole_one(inputs: Path, tmp_path: Path) -> None:
    """At random events inside a save, too: policy and value model are always of one step."""
    kill_at_random(inputs, tmp_path, "ppo", 2, parallel__tensor=2, value__parallel={"tensor": 1})


@pytest.mark.soak
@pytest.mark.parametrize("value", [None, {"tensor": 2}], ids=["same layout", "tp2"])
def test_kills_soak(
    inputs: Path, tmp_path: Path, value: dict[str, int] | None, soak_figures: Callable[..., None]
) -> None:
    soak_figures(**kill_at_random(inputs, tmp_path, "ppo", 12, value__parallel=value))


def test_a_checkpoint_without_value_model_is_not_resumed(inputs: Path, tmp_path: Path) -> None:
    config = ppo_config(inputs, tmp_path / "run", train__async_save=False)  # saved when it dies

    def lose(config: RlvrConfig) -> None:
        rlvr.Learner.partners = property(lambda self: [])  # type: ignore[assignment]  # of this forked process only
        run_and_die(rlvr.run, config, 3)

    with pytest.raises(WorkerError, match="Stopped"):
        in_processes(lose, config)
    with pytest.raises(WorkerError, match=r"CheckpointError: .*step_8: holds no value"):
        in_processes(rlvr.run, config)


# ------------------------------------------------------------------------------------------------ the value model
def test_value_model_starts_as_the_reward_model(inputs: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    items = [
        Item(
            "group",
            [TokenSequence(torch.randint(3, 250, (size,), generator=generator)) for size in (3, 6)],
            prompt=torch.randint(3, 250, (5 + size,), generator=generator),
        )
        for size in range(3)
    ]

    def scores(config: RlvrConfig) -> tuple[list[float], list[float]]:
        run = training_run.open_run(config, "rlvr")
        model = rlvr_values.open_value_model(run, config, 1)
        with model.place.active():
            packs = [pack([with_readout(item) for item in items]), pack(items)]
            found = model.trainer.runner.values(packs)
        return found[0].tolist(), found[1].tolist()

    readouts, tokens = run_forked(1, scores, ppo_config(inputs, tmp_path / "run"))[0]
    model = LlamaForSequenceClassification.from_pretrained(inputs / "rm", dtype=torch.float64).eval()
    wanted_readouts, wanted_tokens = [], []
    for item in items:
        for response in item.responses:
            ids = torch.cat((item.prompt, response.tokens))[None]
            with torch.no_grad():
                wanted_readouts.append(float(model(ids).logits[0, 0]))
                wanted_tokens += _values(model, item.prompt.tolist(), response.tokens.tolist()).tolist()
    assert readouts == pytest.approx(wanted_readouts, abs=1e-5)
    assert tokens == pytest.approx(wanted_tokens, abs=1e-5)


def test_a_language_model_needs_a_new_head(inputs: Path, tmp_path: Path) -> None:
    model = {"path": str(inputs / "small")}
    with pytest.raises(WorkerError, match=r"score\.weight"):
        in_processes(rlvr.run, ppo_config(inputs, tmp_path / "run", value__model=model))
    config = ppo_config(inputs, tmp_path / "new", value__model=model, value__new_head=True, train__steps=1)
    in_processes(rlvr.run, config)
    assert metrics(tmp_path / "new")[0]["value/grad_norm"] > 0


def test_a_value_model_that_reads_other_tokens(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "rm", tmp_path / "rm")
    config = ppo_config(inputs, tmp_path / "run", value__model={"path": str(tmp_path / "rm")})
    train_tokenizer(["quick brown foxes"] * 9, vocab_size=280).save_pretrained(tmp_path / "rm")
    with pytest.raises(WorkerError, match=r"ConfigError: value\.model\.path .*its tokenizer is not that of"):
        in_processes(rlvr.run, config)
    file = tmp_path / "rm" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 270}))
    with pytest.raises(WorkerError, match=r"ConfigError: value\.model\.path .*has 270 vocabulary rows"):
        in_processes(rlvr.run, config)


@pytest.mark.parametrize(("parallel", "words"), [({"tensor": 2}, "1 processes cannot hold"), ({"pipeline": 3}, "3")])
def test_a_layout_that_does_not_fit(inputs: Path, tmp_path: Path, parallel: dict[str, int], words: str) -> None:
    with pytest.raises(WorkerError, match=f"LayoutError: .*{words}"):
        in_processes(rlvr.run, ppo_config(inputs, tmp_path / "run", value__parallel=parallel))


def test_reward_rises(inputs: Path, tmp_path: Path) -> None:
    """The task of test_rlvr, without groups: one answer per prompt."""
    config = ppo_config(
        inputs,
        tmp_path / "run",
        train__steps=20,
        train__save_every=None,
        rlvr__prompts_per_step=64,
        rollout__max_sequences=64,
        rlvr__minibatches=1,
    )
    in_processes(rlvr.run, config)
    rows = metrics(tmp_path / "run")
    rewards = [row["rollout/reward"] for row in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 5
    assert all(row["rollout/live_groups"] == 1 and row["train/skipped_updates"] == 0 for row in rows)
    assert all(row["rollout/reward"] == pytest.approx(10 * row["rollout/accuracy"] - 10 * (1 - row["rollout/eos_rate"]))
               for row in rows)  # fmt: skip
