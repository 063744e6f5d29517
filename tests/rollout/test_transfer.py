"""Weights on their way to servers: files on a disk that is full or shared, and groups of devices."""

import asyncio
import platform
import resource
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from carft_fast.core.errors import EngineError
from carft_fast.models.causal_lm import CarftModel
from carft_fast.models.sampler_weights import SamplerWeights
from carft_fast.rollout.vllm import adapter as vllm_adapter
from carft_fast.rollout.vllm.http import ServerLost
from carft_fast.rollout.vllm.transfer import DeviceTransfer, FileTransfer


def test_weights_of_another_machines_trainer_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that machines share: a name may end like another one's."""
    monkeypatch.setattr(platform, "node", lambda: "node1")
    gone = 2**22 + 1  # no process id
    theirs, own = (tmp_path / f"carft-weights-{gone}-{machine}-abcd_012" for machine in ("gpu-node1", "node1"))
    theirs.mkdir()
    own.mkdir()
    FileTransfer(str(tmp_path)).close()
    assert theirs.is_dir()
    assert not own.exists()


def test_a_full_disk_is_named_with_what_to_do(model: CarftModel, tmp_path: Path) -> None:
    transfer = FileTransfer(str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(EngineError, match=rf"could not be written to {tmp_path}.*set rollout\.transfer_dir"):
            transfer.stage(SamplerWeights(model.lm, torch.float32), "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        transfer.close()


def test_servers_that_come_back_together_are_sent_to_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a group of its own, which the next one's ends. The sender stands for vLLM's, which needs GPUs."""
    events: list[str] = []

    class Sender:
        def __init__(self, *_: Any, **__: Any) -> None:
            events.append("group")

        def send_weights(self) -> None:
            events.append("begin")
            time.sleep(0.3)
            events.append("end")

        def shutdown(self) -> None:
            events.append("shutdown")

    class Api:
        async def nothing(self, *_: Any) -> None:
            pass

        async def world_size(self, _: str) -> int:
            return 1

        open_update = close_update = nothing

    monkeypatch.setattr(vllm_adapter, "device_sender", Sender)
    monkeypatch.setattr(vllm_adapter, "transfer_source", lambda _: None)
    transfer = DeviceTransfer("nccl", 5.0, None)
    transfer.stage(cast(Any, ()), "1")

    async def both() -> None:
        api = cast(Any, Api())
        await asyncio.gather(*(transfer.send(api, [f"http://127.0.0.1:{port}"]) for port in (1, 2)))

    asyncio.run(both())
    assert events == ["group", "begin", "end", "shutdown", "group", "begin", "end"]


def test_a_server_that_dies_before_a_device_transfer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is paused, then does not say how many GPUs it has: the others get the weights."""
    gone, alive = (f"http://127.0.0.1:{port}" for port in (1, 2))
    groups: list[int] = []

    class Sender:
        def __init__(self, *_: Any, world_size: int, **__: Any) -> None:
            groups.append(world_size)

        def send_weights(self) -> None:
            pass

    class Api:
        async def nothing(self, *_: Any) -> None:
            pass

        async def world_size(self, url: str) -> int:
            if url == gone:
                raise ServerLost("no answer")
            return 4

        open_update = close_update = nothing

    monkeypatch.setattr(vllm_adapter, "device_sender", Sender)
    monkeypatch.setattr(vllm_adapter, "transfer_source", lambda _: None)
    transfer = DeviceTransfer("nccl", 5.0, None)
    transfer.stage(cast(Any, ()), "1")
    lost = asyncio.run(transfer.send(cast(Any, Api()), [gone, alive]))
    assert set(lost) == {gone}
    assert groups == [1 + 4]
