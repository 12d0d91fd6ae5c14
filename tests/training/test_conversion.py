"""Imported checkpoints train at any layout, checkpoints of runs are exported, and both survive being killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.test_convert import tensors
from tests.parallel.forked import WorkerError, run_forked, single_process
from tests.training import tiny, tiny_run
from tulu_hpc.cli.main import main
from tulu_hpc.config.architecture import Architecture
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.models.build import build_model
from tulu_hpc.models.comparison import compare
from tulu_hpc.models.conversion import export_hf, import_hf
from tulu_hpc.models.convert import load_hf, save_hf
from tulu_hpc.models.initialise import random_hf_model
from tulu_hpc.models.model_files import open_model, verify_files
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.training import saver
from tulu_hpc.training.reference import weights_fingerprint
from tulu_hpc.training.step import train_step

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "cp2": (2, {"context": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
}


Both = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """By kind of embedding, a Hugging Face directory and what was imported of it."""
    made = {}
    for kind, architecture in (("untied", tiny.ARCHITECTURE), ("tied", tiny.TIED)):
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = (tiny.write_model(folder / "hf", architecture), folder / "checkpoint")
        import_hf(*made[kind], max_shard_bytes=20_000)
    return made.__getitem__


def train(model: Path, parallel: ParallelSection, dtype: str) -> dict[str, Any]:
    """Every bit of the loaded parameters, and one step from them."""
    groups = initialize(layout_of(parallel), seed=1)
    trainer = tiny.make_trainer(model, groups, parallel, dtype=dtype)
    loaded = [p.detach().clone() for each in trainer.models for p in each.parameters()]
    items = tiny.make_items("spgspp")
    data = tiny.global_batch(items, groups, parallel, pack_rows=64)
    result = train_step(trainer, data.packs, tiny.mixed_loss(groups, items))
    return {"loaded": loaded, "loss": result.loss, "norm": result.grad_norm, "weights": tiny.weights(trainer)}


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        *(("untied", name, "float32") for name in LAYOUTS),
        ("untied", "tp2 pp2", "bfloat16"),
        ("tied", "tp2 pp2", "bfloat16"),
        ("tied", "pp2 vpp2", "float32"),
    ],
)
def test_training_from_an_imported_checkpoint(both: Both, kind: str, name: str, dtype: str) -> None:
    world, options = LAYOUTS[name]

    def compared() -> None:
        parallel = ParallelSection(**options)
        theirs, ours = (train(path, parallel, dtype) for path in both(kind))
        assert all(torch.equal(a, b) for a, b in zip(theirs["loaded"], ours["loaded"], strict=True))
        assert (theirs["loss"], theirs["norm"]) == (ours["loss"], ours["norm"])
        assert all(torch.equal(theirs["weights"][k], ours["weights"][k]) for k in theirs["weights"])

    run_forked(world, compared)


def test_reference_logprobs_know_an_imported_model_by_its_content(both: Both, tmp_path: Path) -> None:
    _, imported = both("untied")
    other = tiny.write_model(tmp_path / "hf", tiny.ARCHITECTURE.model_copy(update={"rope_theta": 1e4}))
    import_hf(other, tmp_path / "other", max_shard_bytes=20_000)
    shutil.copytree(imported, tmp_path / "copy")
    with single_process() as groups:
        first, copy, changed, rounded = (
            weights_fingerprint(path, groups, dtype=dtype)
            for path, dtype in (
                (imported, "float32"),
                (tmp_path / "copy", "float32"),
                (tmp_path / "other", "float32"),
                (imported, "bfloat16"),
            )
        )
    assert first == copy and len({first, changed, rounded}) == 3


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_import_is_refused_on_every_rank(both: Both, damage: str, tmp_path: Path) -> None:
    bad = shutil.copytree(both("untied")[1], tmp_path / "bad")
    file = bad / "__1_0.distcp"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-2000] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()

    def load() -> None:
        parallel = ParallelSection()
        tiny.make_trainer(bad, initialize(layout_of(parallel), seed=1), parallel)

    with pytest.raises(WorkerError) as error:
        run_forked(2, load)
    assert str(error.value).count("bad: damaged: __1_0.distcp: ") == 2


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [("untied", "tp2 pp2", "float32"), ("untied", "pp2 vpp2", "bfloat16"), ("tied", "tp2 pp2", "bfloat16")],
)
def test_export_of_a_checkpoint_is_what_the_run_exports(
    both: Both, kind: str, name: str, dtype: str, tmp_path: Path
) -> None:
    world, options = LAYOUTS[name]
    model, _ = both(kind)

    def save() -> None:
        parallel = ParallelSection(**options)
        groups = initialize(layout_of(parallel), seed=1)
        trainer = tiny.make_trainer(model, groups, parallel, dtype=dtype)
        items = tiny.make_items("spgs")
        data = tiny.global_batch(items, groups, parallel, pack_rows=64)
        train_step(trainer, data.packs, tiny.mixed_loss(groups, items))
        saver.save(trainer, tmp_path / "checkpoints", {})
        save_hf(trainer.models, tmp_path / "hf", trainer.architecture, groups, source=model)

    run_forked(world, save)
    step = tmp_path / "checkpoints" / "step_1"
    export_hf(step, tmp_path / "exported", base=model, max_shard_bytes=20_000, workers=2)
    theirs, ours = tensors(tmp_path / "hf"), tensors(tmp_path / "exported")
    assert theirs.keys() == ours.keys()
    assert all(theirs[k].dtype == ours[k].dtype and torch.equal(theirs[k], ours[k]) for k in theirs)
    assert compare(open_model(step, model), open_model(tmp_path / "hf")) == []
    changed = compare(open_model(step, model), open_model(model), dtype=getattr(torch, dtype))
    assert len(changed) > len(theirs) // 2 and changed[0].name == "model.embed_tokens.weight"


def run_verb(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    code = end.value.code
    assert isinstance(code, int)
    return code


def test_the_verbs_on_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import, train from it by the command line, export its checkpoint, verify all four kinds against each other."""
    inputs = tiny_run.write_inputs(tmp_path)
    assert run_verb("import", str(inputs / "model"), str(tmp_path / "start"), "--workers", "2") == 0
    values = tiny_run.config(inputs, tmp_path / "run", "sft", model__path=str(tmp_path / "start"), train__steps=2)
    code, output = tiny_run.run_to_end("sft", tiny_run.write_config(values, tmp_path / "sft.yaml"))
    assert code == 0, output
    run, start, model = (str(tmp_path / name) for name in ("run", "start", "model"))
    assert run_verb("export", run, str(tmp_path / "out"), "--max-shard-gb", "0.00005") == 0
    assert run_verb("verify", run, f"{run}/hf") == run_verb("verify", f"{run}/checkpoints/step_2", f"{run}/hf") == 0
    assert run_verb("verify", str(tmp_path / "out"), f"{run}/hf") == run_verb("verify", model, start) == 0
    for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
        wanted = tmp_path / "run" / "hf" / name
        assert wanted.is_file() == (tmp_path / "out" / name).is_file()
        assert not wanted.is_file() or wanted.read_text() == (tmp_path / "out" / name).read_text()
    capsys.readouterr()
    assert run_verb("verify", model, run) == 2
    assert " tensors, the first: model.embed_tokens.weight: xxh3 " in capsys.readouterr().err
    assert run_verb("import", model, start) == 2
    assert f"error: {start}: exists already" in capsys.readouterr().err
    none = str(tmp_path / "none")
    for arguments, words in (
        (("import", model, model), "the same directory"),
        (("export", start, str(tmp_path / "x"), "--workers", "0"), "--workers 0"),
        (("import", model, str(tmp_path / "x"), "--max-shard-gb", "0"), "--max-shard-gb 0.0"),
        (
            ("export", str(tmp_path / "none"), str(tmp_path / "x")),
            f"error: model {none}: neither a Hugging Face directory",
        ),
    ):
        assert run_verb(*arguments) == 2
        assert words in capsys.readouterr().err


class Kill:
    """Ends the process by SIGKILL at the n-th call of anything that changes a file or directory."""

    NAMES = ("fsync", "rename", "rmdir", "unlink", "open", "preadv")

    def __init__(self, at: int) -> None:
        self._left = at
        for name in self.NAMES:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call


def killed(act: Callable[[], object], at: int) -> bool:
    """Run `act` in a child that is killed at its `at`-th call; whether it was (else it came to its end)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Kill(at)
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def survive_kills(folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """Imports and exports, each killed at random calls until it comes through; every result is whole.

    Returns:
        Kills, and files that a later start kept.
    """
    print(f"seed {seed}")
    generator = random.Random(seed)
    path = tiny.write_model(folder / "hf")
    finished, kept, conversions = 0, [], 0

    def done(_count: int, was: bool) -> None:
        kept.append(was)

    import_hf(path, folder / "whole", max_shard_bytes=20_000)
    while finished < kills:
        conversions += 1
        to_checkpoint = conversions % 2 == 1
        source, convert = (path, import_hf) if to_checkpoint else (folder / "whole", export_hf)
        target = folder / f"out {conversions}"

        def act(source: Path = source, convert: Any = convert, target: Path = target) -> None:
            convert(source, target, max_shard_bytes=20_000, workers=2)

        for _ in range(5):
            if target.exists() or not killed(act, generator.randint(1, 150)):
                break
            finished += 1
            if target.exists():  # killed after the last rename
                break
        if not target.exists():
            convert(source, target, max_shard_bytes=20_000, workers=2, done=done)
        assert verify_files(target) == {}
        assert compare(open_model(path), open_model(target)) == []
        left = {each.name for each in target.iterdir()}
        assert "progress" not in left and not any(name.endswith(".part") for name in left)
        assert not (folder / f".{target.name}.converting").exists()
        shutil.rmtree(target)
    return finished, sum(kept)


def test_killed_conversions_are_continued(tmp_path: Path) -> None:
    kills, kept = survive_kills(tmp_path, 25, seed=11)
    assert kills >= 25 and kept >= 3


@pytest.mark.soak
def test_killed_conversions_are_continued_soak(tmp_path: Path, soak_figures: Callable[..., None]) -> None:
    kills, kept = survive_kills(tmp_path, 400, seed=random.SystemRandom().randrange(10**6))
    assert kept > 100
    soak_figures(kills=kills, files_kept=kept)


DEEP = Architecture(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
)
LARGEST = 2 * DEEP.intermediate_size * DEEP.hidden_size * 4  # bytes of gate and up


class Held(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made by operators since the start."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._known:
                storage = leaf.untyped_storage()
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {at: entry for at, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize("options", [{"tensor": 2, "pipeline": 2}, {"tensor": 4}, {"pipeline": 4}])
def test_export_during_training_holds_one_parameter(options: dict[str, int], tmp_path: Path) -> None:
    random_hf_model(DEEP, tmp_path / "model", seed=1)

    def export() -> int:
        groups = initialize(layout_of(ParallelSection(**options)), seed=1)
        chunks = build_model(DEEP, groups)
        load_hf(chunks, tmp_path / "model", DEEP, groups)

        with Held(parameter for chunk in chunks for parameter in chunk.parameters()) as held:
            save_hf(chunks, tmp_path / "out", DEEP, groups, source=tmp_path / "model", dtype=torch.bfloat16)
        return held.peak

    peaks = run_forked(4, export)
    # A collective may keep what it sent until its thread has noticed the end: one parameter more.
    assert 0.9 * LARGEST < peaks[0] <= 4.1 * LARGEST, peaks
    assert all(peak <= 2.1 * LARGEST for peak in peaks[1:]), peaks
    whole = DEEP.parameter_count() * 4
    assert whole / 6 > 4.1 * LARGEST  # so that holding a shard of the model would be seen
    theirs, ours = tensors(tmp_path / "model"), tensors(tmp_path / "out")
    assert all(torch.equal(theirs[name].bfloat16(), ours[name]) for name in theirs)


def test_held_tensors_are_seen() -> None:
    known = torch.zeros(1000)
    with Held([known]) as held:
        kept = [(known + index)[1:] for index in range(5)]
        assert held.peak == 5 * 4000
        kept.clear()
        _ = known.view(10, 100)
        kept.append(known + 1)
    assert held.peak == 5 * 4000
