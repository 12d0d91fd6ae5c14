"""Reference log-probs on disk: independent of order, layout and place; resumable at any moment; never just trusted."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.forked import run_forked, single_process
from tests.training import tiny, tiny_run
from tulu_hpc.config.loader import ConfigError, load_config
from tulu_hpc.config.schema import DpoConfig
from tulu_hpc.config.sections import ParallelSection
from tulu_hpc.data.packed_batch import Item
from tulu_hpc.parallel.layout import initialize, layout_of
from tulu_hpc.stages import dpo
from tulu_hpc.training import reference
from tulu_hpc.training.reference_cache import ReferenceCache

PLAIN = ParallelSection()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "hf")


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
        layouts = (PLAIN, ParallelSection(tensor=2), ParallelSection(pipeline=2), ParallelSection(context=2))
        for number, parallel in enumerate(layouts):
            for found in run_forked(2, self.attach, model, tmp_path / str(number), pairs[::-1], parallel):
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
            cache = ReferenceCache(tmp_path, folder.name)
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
            shard = next(tmp_path.rglob("shard_000001_*.npy"))
            content = shard.read_bytes()
            for damage in (content[:-7], content[:200] + bytes([content[200] ^ 1]) + content[201:], b""):
                shard.write_bytes(damage)
                assert self.columns(self.attach(model, tmp_path, pairs)) == wanted
                assert f"{shard} is damaged; its rows are computed again" in capsys.readouterr().err

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

    def test_the_order_of_the_data_changes_no_bit(self, model: Path, tmp_path: Path) -> None:
        pairs = tiny.make_items("ppppppp")
        with single_process():
            wanted = self.columns(self.attach(model, tmp_path / "a", pairs))
            assert self.columns(self.attach(model, tmp_path / "b", pairs[::-1])) == wanted
        shards = [{file.name for file in (tmp_path / name).rglob("*.npy")} for name in "ab"]
        assert shards[0] == shards[1] and len(shards[0]) == 4, "the same bytes, so the same names"

    def test_caches_of_two_places_are_joined_by_copying(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half made by another layout, from a copy of the model at another path."""
        pairs = tiny.make_items("pppppp")
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(model, elsewhere / "hf")
        wanted = self.columns(run_forked(1, self.attach, model, tmp_path / "whole", pairs)[0])
        run_forked(1, self.attach, model, tmp_path / "a", pairs[:3])
        run_forked(2, self.attach, elsewhere / "hf", elsewhere / "b", pairs[3:], ParallelSection(tensor=2))
        shutil.copytree(elsewhere / "b", tmp_path / "a", dirs_exist_ok=True)
        shutil.rmtree(elsewhere)
        original, computed = reference.compute_sums, []

        def counting(keyed: dict[str, Item], *rest: Any) -> Any:
            computed.append(len(keyed))
            return original(keyed, *rest)

        monkeypatch.setattr(reference, "compute_sums", counting)
        with single_process():
            found = self.columns(self.attach(model, tmp_path / "a", pairs))
        assert computed == [6], "all six are checked again, none is missing"
        for key, sums in wanted.items():
            assert found[key] == pytest.approx(sums, abs=1e-4)

    @pytest.mark.parametrize("moment", ["open", "fsync", "rename", "after"])
    @pytest.mark.parametrize("shard", [0, 2])
    def test_killed_while_writing(self, model: Path, tmp_path: Path, moment: str, shard: int) -> None:
        """SIGKILL at each step of writing a shard: what was complete is kept, the result is the same to the bit."""
        pairs = tiny.make_items("ppppppp")
        with single_process():
            wanted = self.columns(self.attach(model, tmp_path / "whole", pairs))
        gc.collect()  # a process group of this process must not die in the child: its threads are not there
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            _kill_at(moment, shard)
            with single_process():
                self.attach(model, tmp_path / "killed", pairs)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        complete = len(list((tmp_path / "killed").rglob("shard_*.npy")))
        assert complete == shard + (moment == "after")
        with single_process():
            assert self.columns(self.attach(model, tmp_path / "killed", pairs)) == wanted
        names = [{file.name for file in (tmp_path / name).rglob("shard_*.npy")} for name in ("whole", "killed")]
        assert names[0] == names[1]

    @pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.soak)])
    def test_killed_at_random_moments(
        self, model: Path, tmp_path: Path, kills: int, soak_figures: Callable[..., None]
    ) -> None:
        """The kernel ends the process after a random time, whatever it does then; the result is the same to the bit."""
        seed = int(os.environ.get("TULU_HPC_KILL_SEED", time.time_ns() % 10**6))
        print(f"TULU_HPC_KILL_SEED={seed}")
        generator = random.Random(seed)
        pairs = tiny.make_items("p" * 40)
        started = time.monotonic()
        with single_process():
            wanted = self.columns(self.attach(model, tmp_path / "whole", pairs))
        duration, done, written = time.monotonic() - started, 0, 0
        for number in range(4 * kills):
            if done == kills:
                break
            directory, delay = tmp_path / str(number), generator.uniform(0.01, 1.0) * duration
            code = _in_child(lambda directory=directory: self.attach(model, directory, pairs), delay)
            assert code in (0, -signal.SIGALRM), f"TULU_HPC_KILL_SEED={seed}"
            done += code != 0
            written += len(list(directory.rglob("shard_*.npy")))
            with single_process():
                assert self.columns(self.attach(model, directory, pairs)) == wanted, f"TULU_HPC_KILL_SEED={seed}"
        assert done == kills, "the others were done before their time was up"
        soak_figures(kills=done, caches=number, shards_kept=written, seed=seed)

    def test_at_most_64_rows_are_checked(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pairs = tiny.make_items("p" * 70)
        computed: list[int] = []
        original = reference.compute_sums

        def counting(keyed: dict[str, Item], *rest: Any) -> Any:
            computed.append(len(keyed))
            return original(keyed, *rest)

        with single_process():
            self.attach(model, tmp_path, pairs)
            monkeypatch.setattr(reference, "compute_sums", counting)
            self.attach(model, tmp_path, pairs)
        assert computed == [64]

    def test_a_disk_that_fails_is_reported_by_every_rank(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        def attach() -> str:
            with pytest.raises(reference.ReferenceError, match=r"cannot be written: .*file") as error:
                self.attach(model, tmp_path / "file", tiny.make_items("pp"))
            return str(error.value)

        first, second = run_forked(2, attach)
        assert first == second


def _in_child(work: Callable[[], Any], seconds: float) -> int:
    """Exit code of a forked process that does the work, or is ended by the kernel after so many seconds."""
    gc.collect()  # as above
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process without a word
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with single_process():
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_at(moment: str, shard: int) -> None:
    """From here on this process dies while it writes its `shard`-th shard."""
    calls = {"open": 0, "fsync": 0, "rename": 0}

    def wrap(name: str, original: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            mine = ".npy" in str(arguments[0]) or name == "fsync"
            calls[name] += mine
            dies = mine and calls[name] == shard + 1
            if dies and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    if moment == "open":
        Path.open = wrap("open", Path.open, after=True)  # type: ignore[method-assign]
    elif moment == "fsync":
        os.fsync = wrap("fsync", os.fsync)
    else:
        Path.rename = wrap("rename", Path.rename, after=moment == "after")  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------- as users run it


def dpo_config(inputs: Path, folder: Path, name: str, **changes: Any) -> DpoConfig:
    values = tiny_run.config(inputs, folder / name, "dpo", train__steps=2, train__export_hf=False, **changes)
    values["train"].pop("save_every")
    return load_config(tiny_run.write_config(values, folder / f"{name}.yaml"), (), DpoConfig)


def test_made_in_advance_elsewhere(tmp_path: Path) -> None:
    """`dpo --only-reference` on two ranks and a copy of the model; the run itself, elsewhere, computes nothing."""
    inputs = tiny_run.write_inputs(tmp_path / "inputs")
    shutil.copytree(inputs, tmp_path / "cluster")
    cache = tmp_path / "cluster" / "reference"
    there = {"dpo__reference_cache": str(cache), "parallel__tensor": 2}
    assert run_forked(
        2, lambda: dpo.compute_reference(dpo_config(tmp_path / "cluster", tmp_path, "there", **there))
    ) == [
        cache,
        cache,
    ]
    assert not (tmp_path / "there").exists(), "no run was started"
    assert [path.name for path in cache.iterdir() if not path.is_dir()] == [], "rows and nothing else"
    shutil.move(cache, tmp_path / "moved")
    shutil.rmtree(tmp_path / "cluster")
    shards = sorted((tmp_path / "moved").rglob("*.npy"))
    assert shards
    here = dpo_config(inputs, tmp_path, "here", dpo__reference_cache=str(tmp_path / "moved"))
    run = run_forked(1, lambda: dpo.run(here))[0]
    assert sorted((tmp_path / "moved").rglob("*.npy")) == shards, "every row was found"
    own = run_forked(1, lambda: dpo.run(dpo_config(inputs, tmp_path, "own")))[0]
    assert tiny_run.losses(run) == pytest.approx(tiny_run.losses(own), abs=1e-5)


def test_only_reference_needs_a_place_and_a_loss_that_has_one(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    for changes, message in (
        ({}, "give dpo.reference_cache"),
        ({"dpo__reference": "resident"}, "give dpo.reference_cache"),
        ({"dpo__kind": "simpo", "dpo__reference_cache": "x"}, "simpo needs no reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            dpo.compute_reference(dpo_config(inputs, tmp_path, "run", **changes))


def test_resident_reference_excludes_a_cache(tmp_path: Path) -> None:
    for changes, message in (
        ({"dpo__reference_cache": "x"}, "a resident reference has no reference_cache"),
        ({"dpo__kind": "orpo"}, "orpo needs no reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            dpo_config(tmp_path, tmp_path, "run", dpo__reference="resident", **changes)
