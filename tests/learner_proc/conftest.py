"""A small learner in this process, which tests drive one call at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launcher.run_folder import create_run_folder
from learner_proc.waiting import WaitingLearner
from shared.compose import compose
from shared.lifetime import StopFlag
from shared.logs import configure
from shared.process import Process
from shared.progress import Progress
from shared.run_folder import Run
from tests.fakes.scripted_collector import ScriptedCollector

OVERRIDES = [
    "env.num_envs=2",
    "collector.eval_envs=1",
    "collector.frames_per_batch=16",
    "collector.init_random_frames=32",
    "replay_buffer.buffer_size=256",
    "replay_buffer.batch_size=32",
    "replay_buffer.batch_length=8",
    "replay_buffer.checksum=true",
    "networks.rssm_hidden_dim=8",
    "networks.hidden_dim=8",
    "networks.state_dim=4",
    "optimization.log_every=1000",
    "optimization.publish_every=3",
    "optimization.replay_ratio=null",
]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """2 environments, chunks of 8 ticks, a prefill of two chunks; the sockets lie in tmp_path."""
    settings = compose("quickstart", OVERRIDES)
    lock = create_run_folder(tmp_path / "run")
    folder = lock.folder.path
    yield Process(
        folder, settings, Run("run", str(tmp_path)), configure(folder, "learner"),
        Progress.create(lock.folder.progress("learner")), StopFlag(),
    )  # fmt: skip
    lock.release()


@pytest.fixture
def waiting(process: Process) -> Iterator[WaitingLearner]:
    made = WaitingLearner(process, device=torch.device("cpu"), resume=False)
    yield made
    made.link.close()


@pytest.fixture
def join(tmp_path: Path) -> Callable[[Callable[[], object]], ScriptedCollector]:
    """A function that connects a collector and takes it through the handshake.

    Its argument is called to let the learner read its messages: `serve` of a learner, or `poll` of a link.
    """

    def join(serve: Callable[[], object]) -> ScriptedCollector:
        collector = ScriptedCollector(tmp_path)
        collector.send_hello()
        for _ in range(3):
            serve()
        collector.receive_welcome()
        collector.send_self_test()
        serve()
        return collector

    return join
