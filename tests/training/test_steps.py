"""Normalisation, schedule, reference cache, and what a step does when something is missing or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ModelSection, OptimizerSection, ParallelSection
from tulu_hpc.data.packed_batch import Item, pack
from tulu_hpc.objectives.terms import Terms
from tulu_hpc.parallel.layout import Groups, initialize, layout_of
from tulu_hpc.training import reference
from tulu_hpc.training.normalisation import global_counts
from tulu_hpc.training.runner import Runner
from tulu_hpc.training.schedule import Schedule
from tulu_hpc.training.step import NonFiniteError, train_step
from tulu_hpc.training.trainer import build_trainer, load_model

PLAIN = ParallelSection()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


def one_sft_step(model: Path, letters: str, normalisation: str, **options: Any) -> dict[str, Any]:
    """Gradient and metrics of one global batch of sequences."""
    groups = initialize(layout_of(PLAIN), seed=1)
    trainer = tiny.make_trainer(model, groups, PLAIN)
    data = tiny.global_batch(tiny.make_items(letters), groups, PLAIN, **options)
    counts = global_counts(data.packs, groups)
    loss = tiny.sft_only(8.0 if normalisation == "sum" else float(counts.targets))
    trainer.zero_grad()
    trainer.runner.forward_backward(trainer.runner.prepare(data.packs), loss)
    gradient = tiny.gradients(trainer)
    result = train_step(trainer, data.packs, loss)
    empty = tiny.empty_pack_count(data.packs)
    return {"gradient": gradient, "metrics": result.metrics, "counts": counts, "packs": len(data.packs), "empty": empty}


@pytest.mark.parametrize("normalisation", ["sum", "token_mean"])
def test_gradient_does_not_depend_on_packs_or_ranks(model: Path, normalisation: str) -> None:
    ways = {
        "many packs": (1, {"pack_rows": 32}),
        "dp2": (2, {"pack_rows": 1000}),
        "dp2 many packs": (2, {"pack_rows": 40}),
    }
    wanted = run_forked(1, lambda: one_sft_step(model, "sssss", normalisation, pack_rows=1000))[0]
    assert wanted["packs"] == 1
    for name, (world, options) in ways.items():
        found = run_forked(world, lambda options=options: one_sft_step(model, "sssss", normalisation, **options))[0]
        assert found["counts"].targets == wanted["counts"].targets, name
        assert found["metrics"]["loss"] == pytest.approx(wanted["metrics"]["loss"], abs=1e-6), name
        assert tiny.largest_difference(found["gradient"], wanted["gradient"], relative=True) <= 1e-5, name


def test_mean_of_means_would_be_caught(model: Path) -> None:
    """What the test above protects from: dividing each rank's sum by its own count gives another gradient."""

    def wrong() -> dict[str, Any]:
        groups = initialize(layout_of(PLAIN), seed=1)
        trainer = tiny.make_trainer(model, groups, PLAIN)
        data = tiny.global_batch(tiny.make_items("sssss"), groups, PLAIN, pack_rows=1000)
        own = sum(p.num_targets for p in data.packs)
        trainer.zero_grad()
        batches = trainer.runner.prepare(data.packs)
        trainer.runner.forward_backward(batches, tiny.sft_only(float(own * groups.dp_size)))
        return tiny.gradients(trainer)

    wanted = run_forked(1, wrong)[0]
    found = run_forked(2, wrong)[0]
    assert tiny.largest_difference(found, wanted, relative=True) > 1e-3


def test_a_rank_without_data_takes_part(model: Path) -> None:
    wanted = run_forked(1, lambda: one_sft_step(model, "s", "token_mean", pack_rows=100))[0]
    results = run_forked(2, lambda: one_sft_step(model, "s", "token_mean", pack_rows=100))
    assert sorted(result["empty"] for result in results) == [0, 1]
    for result in results:
        assert result["metrics"] == pytest.approx(wanted["metrics"], abs=1e-6)
    assert tiny.largest_difference(results[0]["gradient"], wanted["gradient"], relative=True) <= 1e-5


def test_non_finite_gradient_stops_the_run(model: Path) -> None:
    with single_process() as groups:
        trainer = tiny.make_trainer(model, groups, PLAIN)
        data = tiny.global_batch(tiny.make_items("ss"), groups, PLAIN, pack_rows=100)

        def broken(output: Any, batch: Any) -> Terms:
            return Terms(output.logprobs_K.sum() * float("nan"), {})

        with pytest.raises(NonFiniteError, match="step 1: the gradient norm is nan"):
            train_step(trainer, data.packs, broken)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.29])
def test_schedule_is_that_of_transformers(kind: Any, warmup: float) -> None:
    from transformers import get_scheduler

    schedule = Schedule(lr=3e-4, total_steps=100, kind=kind, warmup_ratio=warmup)
    assert schedule.warmup_steps == round(100 * warmup)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=100)
    for step in range(100):
        assert schedule.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_gradients_of_less_precision_than_the_model_are_refused(model: Path) -> None:
    """megatron would give such a model fp32 gradients and say nothing."""
    with pytest.raises(ValueError, match=r"optimizer\.gradient_dtype is bfloat16 but model\.dtype is float32"):
        build_trainer(
            model=ModelSection(path=str(model)),
            parallel=ParallelSection(),
            optimizer=OptimizerSection(lr=1e-3, gradient_dtype="bfloat16"),
            recompute="none",
            total_steps=1,
            groups=cast(Groups, None),  # refused before anything is built
            architecture=Architecture.from_hf(model),
        )


def test_schedule_ends_at_the_final_ratio() -> None:
    for kind in ("linear", "cosine"):
        assert Schedule(lr=1.0, total_steps=10, kind=kind, final_ratio=0.1).lr_at(10) == pytest.approx(0.1)


@pytest.mark.parametrize("options", [{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}])
def test_logprobs_on_every_rank(model: Path, options: dict[str, Any]) -> None:
    def compute(parallel: ParallelSection) -> list[torch.Tensor]:
        groups = initialize(layout_of(parallel), seed=1)
        chunks = load_model(ModelSection(path=str(model)), groups, tiny.ARCHITECTURE)
        packs = [pack(tiny.make_items(letters), multiple=2) for letters in ("sp", "gps", "s")]
        found = Runner.create(chunks, groups, tiny.ARCHITECTURE).logprobs(packs)
        assert [f.numel() for f in found] == [p.num_targets for p in packs]
        return found

    wanted = run_forked(1, compute, PLAIN)[0]
    for found in run_forked(2, compute, ParallelSection(**options)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


class TestReferenceCache:
    OPTIONS = reference.PackOptions(pack_rows=128)

    def attach(self, model: Path, directory: Path, items: list[Item], parallel: ParallelSection = PLAIN) -> list[Item]:
        groups = initialize(layout_of(parallel), seed=1)
        runner = tiny.make_trainer(model, groups, parallel).runner
        return reference.attach_reference(
            items,
            runner,
            directory=directory,
            fingerprint=reference.weights_fingerprint(model, groups, dtype="float32"),
            options=self.OPTIONS,
            tolerance=(1e-3, 1e-4),
            seed=0,
            chunk_items=2,
        )

    def columns(self, items: list[Item]) -> dict[str, list[float]]:
        return {item.id: item.per_sequence[reference.COLUMN] for item in items}

    def test_same_at_any_layout_and_order(self, model: Path, tmp_path: Path) -> None:
        pairs = tiny.make_items("ppppp")
        wanted = self.columns(run_forked(1, self.attach, model, tmp_path / "a", pairs)[0])
        for parallel in (PLAIN, ParallelSection(tensor=2), ParallelSection(pipeline=2), ParallelSection(context=2)):
            for found in run_forked(
                2,
                self.attach,
                model,
                tmp_path / f"{parallel.tensor}{parallel.pipeline}{parallel.context}",
                pairs[::-1],
                parallel,
            ):
                got = self.columns(found)
                assert got.keys() == wanted.keys()
                for key, sums in wanted.items():
                    assert got[key] == pytest.approx(sums, abs=1e-4)
        # One layout's cache serves another.
        again = self.columns(run_forked(2, self.attach, model, tmp_path / "a", pairs, ParallelSection(tensor=2))[0])
        assert again == wanted

    def test_interrupted_cache_is_continued(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pairs = tiny.make_items("ppppp")
        computed: list[int] = []
        original = reference.compute_sums

        def counting(keyed: Any, runner: Any, options: Any) -> Any:
            if len(computed) == 2:
                raise KeyboardInterrupt
            computed.append(len(keyed))
            return original(keyed, runner, options)

        monkeypatch.setattr(reference, "compute_sums", counting)
        with single_process(), pytest.raises(KeyboardInterrupt):
            self.attach(model, tmp_path, pairs)
        assert computed == [2, 2]
        computed.clear()
        with single_process():
            found = self.attach(model, tmp_path, pairs)
        assert computed == [4, 1], "four rows are checked again, one is computed"
        assert len(self.columns(found)) == 5

    def test_wrong_rows_stop_the_run(self, model: Path, tmp_path: Path) -> None:
        pairs = tiny.make_items("ppp")
        with single_process():
            self.attach(model, tmp_path, pairs)
            (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
            cache = reference.ReferenceCache(tmp_path, folder.name)
            key = reference.item_key(pairs[1])
            cache.append({key: (cache.rows[key][0] + 0.5, cache.rows[key][1])})
            with pytest.raises(reference.ReferenceError, match=f"chosen response of pair '{pairs[1].id}'"):
                self.attach(model, tmp_path, pairs)

    def test_damaged_shard_is_computed_again(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pairs = tiny.make_items("pppp")
        with single_process():
            wanted = self.columns(self.attach(model, tmp_path, pairs))
            shard = next(tmp_path.rglob("shard_000001.npz"))
            shard.write_bytes(shard.read_bytes()[:-7])
            assert self.columns(self.attach(model, tmp_path, pairs)) == wanted
            assert "missing or damaged" in capsys.readouterr().err
            assert self.columns(self.attach(model, tmp_path, pairs)) == wanted
            assert "damaged" not in capsys.readouterr().err

    def test_other_weights_have_another_cache(self, model: Path, tmp_path: Path) -> None:
        with single_process() as groups:
            first = reference.weights_fingerprint(model, groups, dtype="float32")
            assert first != reference.weights_fingerprint(model, groups, dtype="bfloat16")
            config = json.loads((model / "config.json").read_text())
            other = tmp_path / "other"
            other.mkdir()
            for file in model.iterdir():
                (other / file.name).write_bytes(file.read_bytes())
            assert reference.weights_fingerprint(other, groups, dtype="float32") == first
            (other / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
            assert reference.weights_fingerprint(other, groups, dtype="float32") != first

    def test_key_is_the_content(self) -> None:
        one, two = tiny.make_items("pp")
        assert reference.item_key(one) != reference.item_key(two)
        moved = Item("pair", one.responses, prompt=torch.cat((one.prompt, one.prompt[:1])), id=one.id)
        assert reference.item_key(moved) != reference.item_key(one)
        swapped = Item("pair", one.responses[::-1], prompt=one.prompt, id=one.id)
        assert reference.item_key(swapped) != reference.item_key(one)


def test_late_gathering_with_a_shared_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "hf", tiny.TIED)
    overlap = ParallelSection(pipeline=2, overlap_grad_reduce=True, overlap_param_gather=True)

    def build() -> str:
        with pytest.raises(ValueError, match="overlap_param_gather does not work with tied") as error:
            tiny.make_trainer(model, initialize(layout_of(overlap), seed=1), overlap)
        return str(error.value)

    assert "parallel.pipeline = 2" in run_forked(2, build)[0]
