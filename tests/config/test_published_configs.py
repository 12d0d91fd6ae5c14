"""Every published configuration resolves, carries the paper's numbers, and describes a model that can be built.

Models are built on the meta device: shapes and counts are proven, not that a step runs or fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tulu_hpc.config.schema import DpoConfig, RewardModelConfig, RlvrConfig, SftConfig
from tulu_hpc.config.verbs import TrainingConfig, load_training_config
from tulu_hpc.models.build import build_model
from tulu_hpc.parallel.layout import Layout, destroy, initialize_fake, layout_of

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = [f"tulu3/{size}/{stage}.yaml" for size in ("8b", "70b", "405b") for stage in ("sft", "sft_fixed", "dpo")]
PUBLISHED += [f"tulu3/{size}/rlvr.yaml" for size in ("8b", "70b", "405b")]
PUBLISHED += ["tulu3/8b/rm.yaml", "tulu3.1/8b/grpo.yaml"]
FRAGMENTS = ("model", "value_model")  # stems of files without a model path, which others extend

# Parameters at 128,256 vocabulary rows: 8B and 70B as the hub's safetensors index counts them.
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}


@pytest.fixture(autouse=True)
def _no_groups_left() -> Iterator[None]:
    yield
    destroy()


def stage_parameters(config: TrainingConfig, layout: Layout, stage: int) -> tuple[int, int]:
    """(parameters split over tensor ranks, parameters every tensor rank holds) of tensor rank 0 of a pipeline stage."""
    assert config.model.architecture is not None
    # Ranks run over tensor, context, data, pipeline: rank 0 of a stage is a multiple of all below.
    groups = initialize_fake(layout, rank=stage * layout.tensor * layout.context, world_size=layout.model_parallel)
    assert groups.pp_rank == stage and groups.tp_rank == 0
    chunks = build_model(
        config.model.architecture,
        groups,
        dtype=torch.bfloat16,
        vocab_multiple=config.model.vocab_multiple,
        device="meta",
        head="value" if isinstance(config, RewardModelConfig) else "logprobs",
    )
    assert len(chunks) == (layout.virtual_pipeline or 1)
    split = replicated = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            assert parameter.device.type == "meta"
            if getattr(parameter, "tensor_model_parallel", False):
                split += parameter.numel()
            else:
                replicated += parameter.numel()
    return split, replicated


@pytest.mark.parametrize("name", PUBLISHED)
def test_builds_whole_and_in_its_own_layout(name: str) -> None:
    config = load_training_config(CONFIGS / name, [])
    architecture = config.model.architecture
    assert architecture is not None
    expected = architecture.parameter_count()
    if isinstance(config, RewardModelConfig):
        expected -= (architecture.vocab_size - 1) * architecture.hidden_size

    split, replicated = stage_parameters(config, Layout(), 0)
    assert split + replicated == expected

    layout = layout_of(config.parallel)
    stages = [stage_parameters(config, layout, stage) for stage in range(layout.pipeline)]
    assert sum(split * layout.tensor + replicated for split, replicated in stages) == expected
    # The first stage has the embedding, the last the head and the final norm, those between only layers.
    middle = stages[len(stages) // 2] if layout.pipeline > 2 else None
    embedding = architecture.vocab_size * architecture.hidden_size // layout.tensor
    if middle:
        layer = (middle[0] + middle[1]) / (architecture.num_hidden_layers + 2) * layout.pipeline
        assert stages[0][0] + stages[0][1] == pytest.approx(middle[0] + middle[1] - layer + embedding)
        assert stages[-1][1] - stages[0][1] == architecture.hidden_size


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_before_vocabulary_resize(size: str) -> None:
    for stage in ("sft", "dpo"):
        architecture = load_training_config(CONFIGS / f"tulu3/{size}/{stage}.yaml", []).model.architecture
        assert architecture is not None and architecture.vocab_size == 128256
        assert architecture.parameter_count() == PARAMETERS[size]


def test_tulus_own_checkpoint_has_eight_more_rows() -> None:
    config = load_training_config(CONFIGS / "tulu3.1/8b/grpo.yaml", [])
    assert config.model.architecture is not None
    assert config.model.architecture.parameter_count() == PARAMETERS["8b"] + 2 * 8 * 4096


@pytest.mark.parametrize(
    ("size", "lr", "seed", "batch"), [("8b", 5e-6, 123, 128), ("70b", 2e-6, 456, 128), ("405b", 2e-6, 123, 256)]
)
def test_sft_has_the_papers_numbers(size: str, lr: float, seed: int, batch: int) -> None:
    config = load_training_config(CONFIGS / f"tulu3/{size}/sft.yaml", [])
    assert isinstance(config, SftConfig)
    assert (config.optimizer.lr, config.run.seed, config.train.global_batch_size) == (lr, seed, batch)
    assert (config.optimizer.schedule, config.optimizer.warmup_ratio, config.optimizer.final_lr_ratio) == (
        "linear",
        0.03,
        0.0,
    )
    assert (config.train.epochs, config.data.max_length, config.optimizer.weight_decay) == (2, 4096, 0.0)
    assert (config.sft.normalisation, config.sft.sum_divisor, config.optimizer.clip_grad) == ("sum", batch, 1.0)
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize(("size", "lr", "batch"), [("8b", 5e-7, 128), ("70b", 2e-7, 128), ("405b", 2e-7, 256)])
def test_dpo_has_the_papers_numbers(size: str, lr: float, batch: int) -> None:
    config = load_training_config(CONFIGS / f"tulu3/{size}/dpo.yaml", [])
    assert isinstance(config, DpoConfig)
    assert (config.optimizer.lr, config.train.global_batch_size, config.train.epochs) == (lr, batch, 1)
    assert (config.optimizer.schedule, config.optimizer.warmup_ratio) == ("linear", 0.1)
    assert (config.dpo.kind, config.dpo.beta, config.data.max_length) == ("dpo_norm", 5.0, 2048)
    assert config.train.pack_rows >= 2 * config.data.max_length  # any pair fits a pack


def test_reward_model_has_the_papers_numbers() -> None:
    config = load_training_config(CONFIGS / "tulu3/8b/rm.yaml", [])
    assert isinstance(config, RewardModelConfig)
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.clip_grad) == (3e-6, "linear", 1.0)
    assert (config.train.global_batch_size, config.train.epochs, config.data.max_length) == (256, 1, 2048)
    assert config.train.pack_rows >= 2 * config.data.max_length  # any pair fits a pack


def test_grpo_has_the_published_numbers() -> None:
    config = load_training_config(CONFIGS / "tulu3.1/8b/grpo.yaml", [])
    assert isinstance(config, RlvrConfig)
    assert (config.optimizer.lr, config.optimizer.schedule) == (5e-7, "constant")
    rlvr = config.rlvr
    assert (rlvr.prompts_per_step, rlvr.samples_per_prompt, rlvr.minibatches, rlvr.epochs) == (48, 16, 2, 1)
    assert (rlvr.kl_coef, rlvr.kl_kind, rlvr.advantage, rlvr.clip_low, rlvr.clip_high) == (
        0.01,
        "k3",
        "standard",
        0.2,
        0.2,
    )
    assert (rlvr.verification_reward, rlvr.no_eos_penalty) == (10.0, 0.0)
    assert (config.rollout.temperature, config.rollout.max_new_tokens, config.train.steps) == (1.0, 2048, 1920)


@pytest.mark.parametrize(
    ("size", "lr", "warmup", "kl_coef", "epochs", "batch", "steps", "answer", "seed"),
    [
        ("8b", 3e-7, 0.0, 0.05, 4, 224, 100_000 // 224, 2048, 3),
        ("70b", 1e-7, 0.1, 0.07, 4, 640, 400_000 // 640, 2048, 8),
        ("405b", 1e-7, 0.0, 0.05, 1, 1856, 300_000 // 1856 + 1, 1024, 3),
    ],
)
def test_ppo_has_the_papers_numbers(
    size: str, lr: float, warmup: float, kl_coef: float, epochs: int, batch: int, steps: int, answer: int, seed: int
) -> None:
    config = load_training_config(CONFIGS / f"tulu3/{size}/rlvr.yaml", [])
    assert isinstance(config, RlvrConfig)
    rlvr, value = config.rlvr, config.value
    assert value is not None and value.model.architecture is not None
    for optimizer in (config.optimizer, value.optimizer):
        assert (optimizer.lr, optimizer.schedule, optimizer.warmup_ratio) == (lr, "linear", warmup)
        assert (optimizer.betas, optimizer.eps, optimizer.clip_grad) == ((0.9, 0.999), 1e-8, 1.0)
    assert (rlvr.kind, rlvr.kl_in, rlvr.kl_kind, rlvr.kl_coef) == ("ppo", "reward", "k1", kl_coef)
    assert (rlvr.prompts_per_step * rlvr.samples_per_prompt, rlvr.epochs, rlvr.minibatches) == (batch, epochs, 1)
    assert (rlvr.clip_low, rlvr.clip_high, rlvr.dual_clip) == (0.2, 0.2, None)
    assert (rlvr.verification_reward, rlvr.no_eos_penalty) == (10.0, -10.0)
    assert (value.gamma, value.lam, value.coef, value.clip, value.whiten) == (1.0, 0.95, 0.1, 0.2, True)
    assert (config.train.steps, config.run.seed) == (steps, seed)
    assert (config.data.max_length, config.rollout.max_new_tokens, config.rollout.temperature) == (2048, answer, 1.0)
    assert value.model.architecture.parameter_count() == PARAMETERS["8b"], "one value model for all sizes"
    assert config.verifier.rules == "tulu3-compat"


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_value_models_build_in_their_own_layout(size: str) -> None:
    config = load_training_config(CONFIGS / f"tulu3/{size}/rlvr.yaml", [])
    assert isinstance(config, RlvrConfig) and config.value is not None and config.value.model.architecture is not None
    shape, layout = config.value.model.architecture, layout_of(config.value.parallel or config.parallel)
    layout.data(config.run.gpus or 1)
    (chunk,) = build_model(shape, initialize_fake(layout, rank=0, world_size=layout.model_parallel), device="meta",
                           dtype=torch.bfloat16, head="value")  # fmt: skip
    counts = [
        parameter.numel() * (layout.tensor if getattr(parameter, "tensor_model_parallel", False) else 1)
        for parameter in chunk.parameters()
    ]
    assert sum(counts) == shape.parameter_count() - (shape.vocab_size - 1) * shape.hidden_size


def test_every_training_file_is_covered() -> None:
    """A new file under configs/tulu3* must be listed above; fragments (without a model path) are not training files."""
    found = {
        str(path.relative_to(CONFIGS))
        for folder in ("tulu3", "tulu3.1")
        for path in (CONFIGS / folder).rglob("*.yaml")
        if path.stem not in FRAGMENTS
    }
    assert found == set(PUBLISHED)
