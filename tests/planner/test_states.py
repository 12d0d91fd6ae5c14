"""Weights, gradients and optimizer state: known figures, and equality with the built model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.verbs import load_training_config
from tulu_hpc.models.build import build_model
from tulu_hpc.models.scalar_head import Head
from tulu_hpc.parallel.layout import Layout, LayoutError, destroy, initialize_fake
from tulu_hpc.planner.hardware import GIB, find_gpu
from tulu_hpc.planner.memory import Workload, micro_batches_in_flight, plan_memory, stage_parameters
from tulu_hpc.planner.report import plan_text, workload

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA_405B = Architecture(
    vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
    num_key_value_heads=8,
)  # fmt: skip


@pytest.fixture
def _no_groups_left() -> Iterator[None]:
    yield
    destroy()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "parameters", "states", "reference"),
    [
        # Llama 405B in bfloat16 with fp32 gradients: billions of parameters of a rank of the worst stage, GiB of its
        # states, GiB of a resident reference. Embedding and head count as layers: 128 slots over the stages.
        (8, 16, 1, 3.19, 53.4, 5.9),
        (8, 16, 2, 3.19, 35.6, 5.9),
        (8, 16, 4, 3.19, 26.7, 5.9),
        (8, 8, 4, 6.38, 53.4, 11.9),
        (8, 8, 8, 6.38, 44.5, 11.9),
        (8, 32, 1, 1.59, 26.7, 3.0),
    ],
)
def test_state_table_of_405b(
    tensor: int, pipeline: int, data: int, parameters: float, states: float, reference: float
) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline, sequence=True, account_for_embedding=True, account_for_loss=True)
    work = Workload(LLAMA_405B, layout, data, rows=4096)
    worst = max(plan_memory(work), key=lambda stage: stage.states)
    assert worst.parameters / 1e9 == pytest.approx(parameters, abs=0.005)
    assert worst.states / GIB == pytest.approx(states, abs=0.05)
    with_reference = plan_memory(replace(work, resident_copies=1))[worst.stage]
    assert (with_reference.states - worst.states) / GIB == pytest.approx(reference, abs=0.05)


@pytest.mark.parametrize("head", ["logprobs", "value"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tensor=2, pipeline=2, sequence=True),
        Layout(pipeline=4, virtual_pipeline=2),
        Layout(pipeline=4, virtual_pipeline=2, account_for_embedding=True, account_for_loss=True),
        Layout(tensor=2, pipeline=4, context=2, account_for_embedding=True, account_for_loss=True),
    ],
)
@pytest.mark.usefixtures("_no_groups_left")
def test_parameters_equal_the_built_model(layout: Layout, tied: bool, head: Head) -> None:
    slots = 14 if layout.account_for_embedding else 16
    architecture = Architecture(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=slots, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    work = Workload(architecture, layout, data=1, rows=64, vocab_multiple=4, head=head)
    for stage in range(layout.pipeline):
        groups = initialize_fake(layout, rank=stage * layout.tensor * layout.context, world_size=layout.model_parallel)
        chunks = build_model(architecture, groups, dtype=torch.float32, vocab_multiple=4, device="meta", head=head)
        built = {id(p): p.numel() for chunk in chunks for p in chunk.parameters()}
        assert stage_parameters(work, stage) == sum(built.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("_no_groups_left")
def test_bytes_of_an_fp32_head_equal_the_built_model(tied: bool) -> None:
    layout = Layout(tensor=2, pipeline=2, sequence=True)
    architecture = Architecture(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    work = Workload(architecture, layout, data=2, rows=64, fp32_head=True, gradient_bytes=2, resident_copies=1)
    for stage in plan_memory(work):
        groups = initialize_fake(layout, rank=stage.stage * 2, world_size=4)
        chunks = build_model(architecture, groups, dtype=torch.bfloat16, device="meta", fp32_head=True)
        parameters = list({id(p): p for chunk in chunks for p in chunk.parameters()}.values())
        assert stage.weights == stage.reference == sum(p.numel() * p.element_size() for p in parameters)
        assert stage.gradients == stage.weights, "gradient buffers have the parameters' dtypes"
        # fp32: two moments; bf16: a master copy too; shared by two replicas.
        state = sum(p.numel() * (8 if p.dtype == torch.float32 else 12) for p in parameters)
        assert stage.optimizer == -(-state // 2)


def test_a_value_model_shares_the_ranks() -> None:
    """Its states are added to every stage; what it needs while it is trained competes with the policy's activations."""
    policy = Workload(LLAMA_405B, Layout(tensor=8, pipeline=8, sequence=True, account_for_embedding=True,
                                         account_for_loss=True), data=2, rows=4096, recompute="full")  # fmt: skip
    update = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    small = LLAMA_405B.model_copy(update=update)
    value = Workload(small, Layout(tensor=4, pipeline=2, sequence=True), data=16, rows=65536, head="value")
    beside = plan_memory(value)
    assert beside[0].states != beside[1].states
    for alone, both in zip(plan_memory(policy), plan_memory(replace(policy, value=value)), strict=True):
        assert both.states - alone.states == max(stage.states for stage in beside)
        peak = max(stage.activations + stage.logits for stage in beside)
        assert peak > alone.activations + alone.logits, "the value model's packs are the larger ones here"
        assert both.total == both.states + peak
        assert sum(both.terms().values()) == both.states + both.activations + both.logits + both.cache + peak


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_published_ppo_fits_with_its_value_model(size: str) -> None:
    config = load_training_config(CONFIGS / f"tulu3/{size}/rlvr.yaml", [])
    text, fits = plan_text(config)
    assert fits and "value model: 7,504,928,768 parameters" in text


def test_micro_batches_in_flight() -> None:
    plain = Layout(pipeline=4)
    assert [micro_batches_in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(plain, 0, micro_batches=2) == 2
    # Interleaving holds more: the first of 4 stages with 2 chunks warms up with 10 chunks and adds the current one.
    assert micro_batches_in_flight(Layout(pipeline=4, virtual_pipeline=2), 0) == 11 / 2


def test_context_parallel_shards_state_and_rows() -> None:
    base = Workload(LLAMA_405B, Layout(tensor=8, sequence=True), data=2, rows=8192)
    split = replace(base, layout=Layout(tensor=8, context=2, sequence=True), data=1)
    (one,), (two,) = plan_memory(base), plan_memory(split)
    assert one.optimizer == two.optimizer
    assert two.activations < 0.55 * one.activations


def test_uneven_layout_is_refused() -> None:
    with pytest.raises(LayoutError, match="126 layers cannot be dealt evenly"):
        plan_memory(Workload(LLAMA_405B, Layout(tensor=8, pipeline=16), 1, 4096))


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("tulu3/8b/sft", 32), ("tulu3/8b/dpo", 8), ("tulu3/70b/sft", 64), ("tulu3/70b/dpo", 64),
        ("tulu3/405b/sft", 256), ("tulu3/405b/dpo", 256), ("tulu3.1/8b/grpo", 12),
    ],
)  # fmt: skip
def test_published_configurations_fit_the_published_gpus(name: str, gpus: int) -> None:
    """By the plan; no such run was made here."""
    config = load_training_config(CONFIGS / f"{name}.yaml", [])
    text, fits = plan_text(config, gpu="h100", gpus=gpus)
    assert fits, text


def test_host_memory_of_a_background_save() -> None:
    config = load_training_config(CONFIGS / "tulu3/8b/sft.yaml", [])
    # 8.03e9 parameters: bfloat16 weights, and master and two moments in float32
    wanted = f"{8_030_261_248 * 14 / config.parallel.model_parallel / 2**30:.1f} GiB per rank of the first replica"
    assert wanted in plan_text(config, gpu="h100", gpus=32)[0]
    off = load_training_config(CONFIGS / "tulu3/8b/sft.yaml", ["train.async_save=false"])
    assert "host memory" not in plan_text(off, gpu="h100", gpus=32)[0]


def test_a_resident_reference_is_counted() -> None:
    cached = workload(load_training_config(CONFIGS / "tulu3/8b/dpo.yaml", []))
    resident = workload(load_training_config(CONFIGS / "tulu3/8b/dpo.yaml", ["dpo.reference=resident"]))
    (without,), (with_it,) = plan_memory(cached), plan_memory(resident)
    assert without.reference == 0
    assert with_it.reference == with_it.weights and with_it.total - without.total == with_it.weights


def test_what_does_not_fit_says_why() -> None:
    config = load_training_config(CONFIGS / "tulu3/405b/sft.yaml", ["train.recompute=none"])
    text, fits = plan_text(config, gpu="h100", gpus=256)
    assert not fits
    assert "largest term: activations" in text
    assert "would fit: train.recompute=full" in text
    config = load_training_config(CONFIGS / "tulu3/405b/sft.yaml", [])
    text, fits = plan_text(config, gpu="h100", gpus=128)
    assert fits and "optimizer" in text  # 53.4 GiB of states and little else
    text, fits = plan_text(config, gpu="40", gpus=128)
    assert not fits and "largest term: optimizer" in text


def test_uneven_stages_are_shown() -> None:
    even = [f"parallel.account_for_{end}_in_pipeline_split=false" for end in ("embedding", "loss")]
    ends = ["parallel.first_stage_layers=7", "parallel.last_stage_layers=7"]
    explicit = load_training_config(CONFIGS / "tulu3/405b/sft.yaml", even + ends)
    counted = load_training_config(CONFIGS / "tulu3/405b/sft.yaml", [])
    text, _ = plan_text(explicit, gpu="h100", gpus=256)
    assert "pipeline 16 of 7 + 14 x 8 + 7 layers" in text
    assert plan_text(counted, gpu="h100", gpus=256)[0] == text  # the same stages, said in another way
    impossible = load_training_config(CONFIGS / "tulu3/405b/sft.yaml", even + ends[:1])
    with pytest.raises(LayoutError, match=r"126 layers cannot be dealt evenly .*first 7, last None"):
        plan_text(impossible, gpu="h100", gpus=256)


def test_sgd_keeps_one_moment() -> None:
    sgd = load_training_config(CONFIGS / "tulu3/8b/sft.yaml", ["optimizer.kind=sgd", "parallel.tensor=1"])
    adam = load_training_config(CONFIGS / "tulu3/8b/sft.yaml", ["parallel.tensor=1"])
    one, two = (plan_memory(workload(config, 8))[0] for config in (sgd, adam))
    assert one.optimizer / two.optimizer == pytest.approx(8 / 12)  # fp32 master and momentum, or two moments


def test_rlvr_counts_reference_and_cache() -> None:
    config = load_training_config(CONFIGS / "tulu3.1/8b/grpo.yaml", [])
    (stage,) = plan_memory(workload(config, 12))
    assert stage.reference == stage.weights
    # 64 sequences of 4096 tokens, 32 layers, 4 of 8 heads of 128, keys and values, 2 bytes
    assert stage.cache == 64 * 4096 * 32 * 4 * 128 * 2 * 2
    without = load_training_config(CONFIGS / "tulu3.1/8b/grpo.yaml", ["rlvr.kl_coef=0"])
    assert plan_memory(workload(without, 12))[0].reference == 0


def test_gpu_names() -> None:
    assert find_gpu("H100").name == "h100"
    assert find_gpu("96").memory_bytes == 96 * GIB
    with pytest.raises(ValueError, match="did you mean h100"):
        find_gpu("h1000")
