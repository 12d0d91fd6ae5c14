"""An fp32 head in a bf16 model: log-probs, gradients, updates, decoding, checkpoints and the export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel.forked import WorkerError, run_forked, single_process
from tests.training import tiny
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection
from tulu_hpc.models.build import unwrap
from tulu_hpc.models.convert import save_hf
from tulu_hpc.models.decode import Decoder
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training import checkpoint, saver
from tulu_hpc.training import optimizer as repairs
from tulu_hpc.training.step import train_step
from tulu_hpc.training.trainer import Trainer, build_trainer

HEAD = {False: "lm_head.weight", True: "model.embed_tokens.weight"}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = tiny.TIED if request.param else tiny.ARCHITECTURE
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf", architecture)


def make(model: Path, groups: Groups, parallel: ParallelSection, *, lr: float = 1e-3, **options: Any) -> Trainer:
    return build_trainer(
        model=ModelSection(path=str(model), dtype="bfloat16", fp32_head=True),
        parallel=parallel,
        optimizer=OptimizerSection(lr=lr, schedule="constant", **options),
        recompute="none",
        total_steps=10,
        groups=groups,
        architecture=Architecture.from_hf(model),
    )


def head_in_file(model: Path) -> Tensor:
    return load_file(model / "model.safetensors")[HEAD[Architecture.from_hf(model).tie_word_embeddings]]


def watch_hidden(trainer: Trainer) -> list[Tensor]:
    """Rows that reach the head, collected at every forward pass."""
    seen: list[Tensor] = []
    norm = unwrap(trainer.chunks[-1]).decoder.final_layernorm
    norm.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()[:, 0].clone()))
    return seen


def test_logprobs_and_head_gradient_against_fp64(model: Path) -> None:
    def body() -> dict[str, float]:
        groups = initialize(layout_of(ParallelSection()), seed=1)
        trainer = make(model, groups, ParallelSection())
        head = head_in_file(model)
        kept = unwrap(trainer.chunks[0]).local_vocab()[0]
        assert kept.dtype == torch.float32 and torch.equal(kept.detach(), head), "the file's fp32 weights, bit for bit"
        others = {p.dtype for name, p in trainer.models[0].named_parameters() if p is not kept and "layers" in name}
        assert others == {torch.bfloat16}
        seen = watch_hidden(trainer)
        data = tiny.global_batch(tiny.make_items("ss"), groups, ParallelSection(), pack_rows=100)
        (pack,) = data.packs
        (found_K,) = trainer.runner.logprobs([pack])
        hidden = seen[-1]
        assert hidden.dtype == torch.bfloat16

        def oracle(weight: Tensor) -> Tensor:
            logits = hidden[pack.hidden_row_K].double() @ weight.T
            return logits.log_softmax(-1).gather(1, pack.target_K[:, None])[:, 0]

        weight = head.double().requires_grad_()
        wanted_K = oracle(weight)
        rounded_K = oracle(head.bfloat16().double())
        wanted_K.sum().neg().backward()
        gradient = torch.zeros(())
        if not trainer.architecture.tie_word_embeddings:  # else the embedding's gradient is in it too
            trainer.zero_grad()
            trainer.runner.forward_backward(
                trainer.runner.prepare([pack]), lambda output, batch: Terms(-output.logprobs_K.sum())
            )
            assert kept.main_grad.dtype == torch.float32
            assert weight.grad is not None
            gradient = (kept.main_grad - weight.grad).abs().max() / weight.grad.abs().max()
        return {
            "error": float((found_K - wanted_K).abs().max()),
            "rounded": float((rounded_K - wanted_K).abs().max()),
            "gradient": float(gradient),
        }

    (found,) = run_forked(1, body)
    assert found["error"] <= 5e-6, found
    assert found["rounded"] > 100 * found["error"], "a bf16 head would be noticed"
    assert found["gradient"] <= 5e-6, found


def steps(model: Path, parallel: ParallelSection, kinds: Sequence[str], folder: Path, lr: float) -> dict[str, Any]:
    """A few steps, a checkpoint in between; then the last ones again from the checkpoint."""
    groups = initialize(layout_of(parallel), seed=1)
    trainer = make(model, groups, parallel, lr=lr)

    def train(kinds: Sequence[str], first: int) -> list[float]:
        losses = []
        for step, letters in enumerate(kinds, start=first):
            items = tiny.make_items(letters, seed=step)
            data = tiny.global_batch(items, groups, parallel, pack_rows=96)
            losses.append(train_step(trainer, data.packs, tiny.mixed_loss(groups, items)).loss)
        return losses

    losses = train(kinds[:1], 0)
    saver.save(trainer, folder, {})
    losses += train(kinds[1:], 1)
    trainer.synchronise_parameters()
    whole = tiny.weights(trainer)
    trainer = make(model, groups, parallel, lr=lr)
    assert checkpoint.load_latest(trainer, folder) == (1, {})
    assert train(kinds[1:], 1) == losses[1:]
    trainer.synchronise_parameters()
    again = tiny.weights(trainer)
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.items()), "resumed bit for bit"
    save_hf(trainer.models, folder / "hf", trainer.architecture, groups, source=model, dtype=torch.bfloat16)
    return {"losses": losses, "weights": whole}


LAYOUTS = {
    "tp2 pp2": (4, ParallelSection(tensor=2, pipeline=2)),
    "dp2": (2, ParallelSection(overlap_grad_reduce=True)),
}


def test_trains_saves_and_exports_in_any_layout(model: Path, tmp_path: Path) -> None:
    kinds, lr = ["sspg", "spgs"], 1e-6
    name = HEAD[Architecture.from_hf(model).tie_word_embeddings]
    (wanted,) = run_forked(1, lambda: steps(model, ParallelSection(), kinds, tmp_path / "one", lr))
    head = wanted["weights"][name]
    moved = (head - head_in_file(model)).abs()
    assert head.dtype == torch.float32
    assert 0 < float(moved.max()) < 1e-5, "a step smaller than bf16 can hold is kept"
    exported = load_file(tmp_path / "one" / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert torch.equal(exported[name], head.bfloat16())
    for layout, (world, parallel) in LAYOUTS.items():
        found = run_forked(world, lambda p=parallel, n=layout: steps(model, p, kinds, tmp_path / n, lr))[0]
        assert found["losses"] == pytest.approx(wanted["losses"], abs=2e-2), layout  # the body is bf16
        assert found["weights"][name].dtype == torch.float32
        assert float((found["weights"][name] - head).abs().max()) <= 4 * lr, layout


def test_without_the_numbering_by_dtype_no_checkpoint_can_be_written(tmp_path: Path) -> None:
    untied = tiny.write_model(tmp_path / "hf")

    def body() -> None:
        repairs.number_by_dtype = lambda optimizer: None  # of this forked process
        steps(untied, ParallelSection(), ["sspg", "spgs"], tmp_path, 1e-6)

    with pytest.raises(WorkerError, match="must match the size of tensor"):
        run_forked(1, body)


def test_refused_where_megatron_could_not_save_it(model: Path) -> None:
    with single_process() as groups, pytest.raises(ValueError, match=r"needs parallel\.distributed_optimizer"):
        make(model, groups, ParallelSection(distributed_optimizer=False))


@pytest.mark.parametrize("parallel", [ParallelSection(), ParallelSection(tensor=2)], ids=["one", "tp2"])
def test_decoding_uses_the_fp32_head(model: Path, parallel: ParallelSection) -> None:
    def body() -> float:
        groups = initialize(layout_of(parallel), seed=1)
        trainer = make(model, groups, parallel)
        seen = watch_hidden(trainer)
        decoder = Decoder(trainer.chunks, groups, trainer.architecture, max_sequences=2, max_length=12)
        prompt = torch.arange(1, 8)
        worst = 0.0
        for call in range(2):
            logits = decoder.prefill([prompt], [2]) if call == 0 else decoder.step(torch.tensor([5, 6]))
            assert logits is not None and logits.dtype == torch.float32
            hidden = seen[-1]
            if groups.layout.sequence_parallel:
                parts = [torch.empty_like(hidden) for _ in range(groups.tp_size)]
                torch.distributed.all_gather(parts, hidden, group=groups.pg.tp)
                hidden = torch.cat(parts)
            rows = hidden[[6, 6]] if call == 0 else hidden[:2]
            wanted = rows.double() @ head_in_file(model).double().T
            worst = max(worst, float((logits - wanted).abs().max() / wanted.abs().max()))
        return worst

    for worst in run_forked(2 if parallel.tensor == 2 else 1, body):
        assert worst <= 1e-6
