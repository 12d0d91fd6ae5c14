"""Embedding noise: its distribution, its size, and that no layout changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked
from tests.training import tiny
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.packed_batch import Item, TokenSequence, pack
from tulu_hpc.models.embedding_noise import KEY, SCALE, add_noise_columns, noisy, uniform_noise
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training.step import train_step

LETTERS = ["sssss", "ssssssss"]
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "small packs": (1, {"pack_rows": 40}),
    "tp2 sp": (2, {"tensor": 2}),
    "cp2": (2, {"context": 2}),
    "pp2 full recompute": (2, {"pipeline": 2, "recompute": "full"}),
    "dp2": (2, {}),
}


def two_steps(model: Path, alpha: float, options: dict[str, Any]) -> list[float]:
    parallel = ParallelSection(**{k: v for k, v in options.items() if k in ParallelSection.model_fields})
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel, recompute=options.get("recompute", "none"))
    found = []
    for step, letters in enumerate(LETTERS):
        data = tiny.global_batch(
            tiny.make_items(letters, seed=step), groups, parallel, pack_rows=options.get("pack_rows", 400)
        )
        if alpha:
            add_noise_columns(data.packs, alpha=alpha, seed=3, step=step)
        result = train_step(trainer, data.packs, tiny.sft_only(8.0))
        found += [result.loss, result.grad_norm]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


def test_no_layout_changes_the_noise(model: Path) -> None:
    found = {name: run_forked(world, two_steps, model, 5.0, options)[0] for name, (world, options) in WAYS.items()}
    wanted = found.pop("one process")
    for name, values in found.items():
        assert values == pytest.approx(wanted, rel=1e-5), name
    without = run_forked(1, two_steps, model, 0.0, {})[0]
    assert all(abs(a - b) > 1e-3 for a, b in zip(without, wanted, strict=True)), "the noise must be there"


def test_uniform_and_independent() -> None:
    key_T = torch.arange(400) * 977 - 5000
    noise = uniform_noise(key_T, 512)
    assert noise.dtype == torch.float32 and float(noise.min()) >= -1.0 and float(noise.max()) < 1.0
    assert torch.equal(noise[7:9], uniform_noise(key_T[7:9], 512)), "a row's noise is its own"
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 * (1 / 3 / count) ** 0.5
    assert abs(float(noise.square().mean()) - 1 / 3) < 0.005
    for shifted in (noise.roll(1, 0), noise.roll(1, 1)):
        assert abs(float((noise * shifted).mean())) < 4 / 3 / count**0.5
    shares = torch.histc(noise, bins=20, min=-1, max=1) / count
    assert float((shares - 0.05).abs().max()) < 0.003


def test_size_is_the_papers() -> None:
    """alpha / sqrt(L H) times Uniform(-1, 1), with L of each sequence; nothing on padding."""
    lengths = (9, 5)
    items = [Item("sequence", [TokenSequence(torch.arange(n))], id=str(n)) for n in lengths]
    batch = pack(items, multiple=8)
    add_noise_columns([batch], alpha=5.0, seed=0, step=1)
    rows = [n - 1 for n in lengths]  # the last token is only a target
    expected = [5.0 / rows[0] ** 0.5] * rows[0] + [5.0 / rows[1] ** 0.5] * rows[1] + [0.0] * 4
    assert torch.allclose(batch.per_row[SCALE], torch.tensor(expected))
    assert batch.per_row[KEY][: sum(rows)].unique().numel() == sum(rows)
    embedding = torch.randn(16, 1, 64, requires_grad=True)
    out = noisy(embedding, batch.per_row[KEY], batch.per_row[SCALE])
    change = (out - embedding).detach().abs().amax(dim=(1, 2))
    bound = torch.tensor(expected) / 64**0.5
    assert bool((change <= bound).all()) and bool((change[: sum(rows)] > 0.8 * bound[: sum(rows)]).all())
    out.sum().backward()
    assert embedding.grad is not None and bool((embedding.grad == 1).all())
    other = pack(items[::-1], multiple=8)
    add_noise_columns([other], alpha=5.0, seed=0, step=1)
    assert torch.equal(other.per_row[KEY][rows[1] : sum(rows)], batch.per_row[KEY][: rows[0]])
    add_noise_columns([other], alpha=5.0, seed=0, step=2)
    assert not torch.equal(other.per_row[KEY][rows[1] : sum(rows)], batch.per_row[KEY][: rows[0]])


def test_shared_prompts_are_refused() -> None:
    pair = Item("pair", [TokenSequence(torch.arange(4))] * 2, prompt=torch.arange(3), id="p")
    with pytest.raises(ValueError, match="shares prompts"):
        add_noise_columns([pack([pair])], alpha=5.0, seed=0, step=0)
