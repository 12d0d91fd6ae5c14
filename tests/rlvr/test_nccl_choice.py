"""rollout.vllm.sync = nccl: refused where it cannot run, before anything is started; else the servers are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rlvr import tiny_rlvr
from tests.rlvr.tiny_rlvr import rlvr_config
from tests.rollout.stub_nccl import Stub, stub, stub_library  # noqa: F401
from tulu_hpc.config.loader import ConfigError
from tulu_hpc.config.schema import RlvrConfig
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.nccl_sync import NOT_RUN, NcclChannel
from tulu_hpc.rollout.weight_sync import Channel
from tulu_hpc.stages import rlvr, rollout_server, served


def config_of(folder: Path, **vllm: Any) -> RlvrConfig:
    inputs = tiny_rlvr.write_inputs(folder)
    values = {"rollout__engine": "vllm", "rollout__temperature": 1.0, "rollout__vllm": {"sync": "nccl", **vllm}}
    return rlvr_config(inputs, folder / "run", **values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refused_without_a_gpu(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.sync = nccl needs GPUs, and there is none here"):
        rlvr.check(config)
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.sync = nccl needs GPUs"):
        rollout_server.run(config, tmp_path / "log")
    assert not (tmp_path / "log").exists(), "a server was started"


def test_refused_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "default_device", lambda: torch.device("cuda", 0))
    config = config_of(tmp_path, nccl_library=str(tmp_path / "libnccl.so.2"))
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.sync = nccl: NCCL cannot be loaded: .*libnccl\.so\.2"):
        rlvr.check(config)


def test_taken_with_both(
    stub: Stub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "default_device", lambda: torch.device("cuda", 3))
    config = config_of(tmp_path, nccl_library=str(stub.path), bucket_mib=2, sync_timeout_seconds=50)
    rlvr.check(config)
    options = served.server_options(config)
    assert '{"backend": "tulu_hpc_nccl"}' in options.arguments(8000)
    assert float(options.environment()["TULU_HPC_SYNC_SECONDS"]) > 50, "the trainer should give up first"
    channel = served.channel_of(config.rollout.vllm)(Address("127.0.0.1", 8000), 50.0, lambda version: None)
    assert isinstance(channel, NcclChannel)
    assert (channel.library, channel.bucket_bytes, channel.device.index) == (str(stub.path), 2 << 20, 3)


@pytest.mark.parametrize("sync", ["gloo", "checkpoint"])
def test_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: str) -> None:
    monkeypatch.setattr(served, "default_device", lambda: torch.device("cuda", 0))
    config = config_of(tmp_path, sync=sync)
    rlvr.check(config)
    assert '{"backend": "tulu_hpc_gloo"}' in served.server_options(config).arguments(8000)
    assert served.channel_of(config.rollout.vllm) is Channel


def test_a_run_says_that_this_has_not_run(
    stub: Stub,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, nccl_library=str(stub.path))
    said: list[str] = []
    run: Any = SimpleNamespace(say=said.append, architecture=SimpleNamespace(vocab_size=50))
    trainer: Any = None
    served.ServedEngine(run, config, trainer, [Address("127.0.0.1", 8000)], [])
    assert said == [f"weights go to the rollout servers over NCCL 2.29.7 ({stub.path}): {NOT_RUN}"]
    assert "has not been run on NCCL" in NOT_RUN
