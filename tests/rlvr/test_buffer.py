"""The journal of finished samples: every bit comes back, and what is broken, foreign or double is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rlvr.tiny_rlvr import rlvr_config
from tulu_hpc.rollout.engine import Completion, VersionSpan
from tulu_hpc.stages.rlvr_buffer import Journal, JournalError, Sample, SampleKey, identity, journals, prune


def sample(step: int, number: int = 0, place: int = 0, version: int = 3) -> Sample:
    completion = Completion(
        token_ids=[5, 7, 1],
        logprobs=[-0.1, -1 / 3, -1e-17],
        finish_reason="stop",
        stop_reason=1,
        policy_version=version,
        id=str(SampleKey(step, 0, number, place)),
        version_spans=(VersionSpan(version, 0, 2), VersionSpan(version + 1, 2, 3)),
    )
    return Sample(SampleKey(step, 0, number, place), "record", completion, 0.1 + 0.2, 'why: "ü"\u2028')


def written(folder: Path, steps: int = 2, count: int = 3) -> Path:
    """A journal of some steps; the file of the last."""
    journal = Journal(folder, 0, "run")
    for step in range(1, steps + 1):
        journal.append([sample(step, number) for number in range(count)])
    journal.close()
    return journals(folder)[-1]


def test_every_bit_comes_back(tmp_path: Path) -> None:
    written(tmp_path)
    Journal(tmp_path, 1, "run").append([sample(2, 9)])  # of another replica
    found = Journal(tmp_path, 0, "run").replay(after=0)
    wanted = [sample(step, number) for step in (1, 2) for number in range(3)] + [sample(2, 9)]
    assert found == {each.key: each for each in wanted}
    assert {key.step for key in Journal(tmp_path, 0, "run").replay(after=1)} == {2}


@pytest.mark.parametrize("kept", ["byte", "half", "all but the newline"])
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path, kept: str) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    end = {"byte": start + 1, "half": (start + len(content)) // 2, "all but the newline": len(content) - 1}[kept]
    path.write_bytes(content[:end])
    journal = Journal(tmp_path, 0, "run")
    found = journal.replay(after=1)
    assert sorted(found) == [SampleKey(2, 0, 0, 0), SampleKey(2, 0, 1, 0)]
    journal.append([sample(2, 2)])
    assert path.read_bytes() == content
    journal.close()


def test_a_file_torn_in_its_header(tmp_path: Path) -> None:
    path = written(tmp_path, steps=1)
    path.write_bytes(path.read_bytes()[:10])
    journal = Journal(tmp_path, 0, "run")
    assert journal.replay(after=0) == {}
    journal.append([sample(1)])
    assert list(Journal(tmp_path, 0, "run").replay(after=0)) == [SampleKey(1, 0, 0, 0)]


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"-0.1,")] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalError, match=rf"{path.name}:2: damaged"):
        Journal(tmp_path, 0, "run").replay(after=0)


def test_dropped_samples_are_not_replayed(tmp_path: Path) -> None:
    written(tmp_path, steps=1)
    journal = Journal(tmp_path, 0, "run")
    journal.drop([SampleKey(1, 0, 1, 0)])
    assert SampleKey(1, 0, 1, 0) not in journal.replay(after=0)
    journal.append([sample(1, 1, version=8)])
    assert journal.replay(after=0)[SampleKey(1, 0, 1, 0)] == sample(1, 1, version=8)


def test_a_sample_twice_is_refused(tmp_path: Path) -> None:
    written(tmp_path, steps=1)
    other = Journal(tmp_path, 1, "run")
    other.append([sample(1, 2)])
    with pytest.raises(JournalError, match="step 1, prompt 2, sample 0 is in the buffer twice"):
        Journal(tmp_path, 0, "run").replay(after=0)
    same = Journal(tmp_path, 0, "run")
    same.append([sample(1, 2)])
    with pytest.raises(JournalError, match=r"replica_0\.journal:5: step 1, prompt 2, sample 0 is in the buffer twice"):
        same.replay(after=0)


def test_another_run_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(JournalError, match="other prompts or another configuration"):
        Journal(tmp_path, 0, "other").replay(after=0)


def test_identity(tmp_path: Path) -> None:
    """What a resumed run may change is not part of it."""

    def of(prompts: str = "p", **changes: object) -> str:
        return identity(rlvr_config(tmp_path, tmp_path / "run", **changes), prompts)

    assert of() == of(train__save_every=7, parallel__tensor=2, rollout__vllm={"probe_seconds": 9.0})
    different = {of(), of("q"), of(run__seed=4), of(rollout__temperature=0.8), of(rlvr__kl_coef=0.5)}
    assert len(different) == 5


def test_pruning(tmp_path: Path) -> None:
    written(tmp_path, steps=12)
    prune(tmp_path, covered=10)
    assert [path.name for path in journals(tmp_path)] == ["step_11.replica_0.journal", "step_12.replica_0.journal"]
