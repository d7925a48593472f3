"""A real collector process and the smallest learner that can serve it: link, ring and publisher, no gradient step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import REPO
from launcher.run_folder import create_run_folder
from learner_proc.handshake import Handshake
from learner_proc.link import CollectorLink
from learner_proc.pacing import MAX_GRANTED
from learner_proc.publisher import Publisher
from learner_proc.replay import Replay
from learner_proc.startup import allocate_replay
from shared.compose import compose, save_settings
from shared.config import Settings
from shared.files import write_json
from shared.geometry import Geometry
from shared.logs import configure
from shared.messages import Commit
from shared.model.policy import Policy
from shared.socket_folder import make_socket_dir, read_secret, remove_socket_dir
from shared.stream import StreamSpec

START_S = 600.0  # some simulators compile their kernels when they start
STALLED_S = 300.0  # and others in their first tick


def pair_settings(config: str, overrides: list[str], *, envs: int, ticks: int) -> Settings:
    """Return a preset with chunks of `ticks` ticks and a ring of eight chunks, without random actions."""
    frames = envs * ticks
    sizes = [
        f"collector.frames_per_batch={frames}",
        f"collector.init_random_frames={frames}",
        f"replay_buffer.buffer_size={8 * frames}",
        f"replay_buffer.batch_length={ticks}",
        f"replay_buffer.batch_size={10 * ticks}",
        "optimization.replay_ratio=null",
        "logger.backend=none",
    ]
    return compose(config, [*sizes, *overrides])


class LearnerEnd:
    """Starts a collector process and serves it from this process. Use it as a context manager.

    Raises: RuntimeError if the collector ends, or sends nothing for minutes.
    """

    def __init__(self, settings: Settings, *, device: str = "cpu", module: str = "collector_proc") -> None:
        self.settings, self.device = settings, torch.device(device)
        self.geometry = Geometry.of(settings)
        self._temporary = tempfile.TemporaryDirectory(prefix="tandem-benchmark-")
        self.run_dir = Path(self._temporary.name) / "run"
        self._lock, self._sockets = create_run_folder(self.run_dir), make_socket_dir()
        write_json(self._lock.folder.run_json, {"run_id": "benchmark", "socket_dir": str(self._sockets)})
        save_settings(settings, self._lock.folder.config)
        log = configure(self.run_dir, "learner")
        self.link = CollectorLink(
            self._sockets,
            Handshake(
                run_id="benchmark",
                secret=read_secret(self._sockets),
                num_envs=self.geometry.num_envs,
                allocate=self._allocate,
                random_frames=lambda: 0,
                agent_steps=lambda: 0,
                gpu_storage=settings.replay_buffer.gpu_storage,
                log=log,
            ),
            check_sums=False,
            log=log,
        )
        self._output = (self.run_dir / "collector.out").open("w")
        command = [sys.executable, "-m", module, "--run-dir", str(self.run_dir), "--device", device]
        environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
        self._child = subprocess.Popen(
            command, cwd=REPO, env=environment, stdout=self._output, stderr=subprocess.STDOUT
        )
        self.publisher: Publisher | None = None

    def __enter__(self) -> LearnerEnd:
        try:
            self._start()
        except BaseException:
            self.close()  # __exit__ is not called when __enter__ raises
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        end = time.monotonic() + START_S
        while self.link.streaming is None:
            self._check(end)
            self.serve(grant=False)
            self.link.wait(0.01)
        torch.manual_seed(self.settings.env.seed)
        policy = Policy(self.link.streaming.shared.spec, self.settings.networks).to(self.device)
        self.publisher = Publisher(policy, socket_dir=self._sockets, run_id="benchmark")
        self.publisher.publish(step=0)
        self.run_chunks(1)  # takes the chunk granted after the self-test; caches are warm afterwards

    def close(self) -> None:
        """End the collector and remove its folders and sockets."""
        self._child.terminate()
        try:
            self._child.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self.publisher is not None:
            self.publisher.close()
        self.link.close()
        self._output.close()
        self._lock.release()
        remove_socket_dir(self._sockets, is_own=True)
        self._temporary.cleanup()

    @property
    def replay(self) -> Replay:
        """Return the replay that the collector writes to."""
        assert self.link.shared is not None
        return self.link.shared.replay

    def serve(self, *, grant: bool = True) -> list[Commit]:
        """Do one pass of the learner's loop without a gradient step: take commits, and grant the next chunks."""
        commits = [chunk.commit for chunk in self.link.poll()]
        while grant and self.link.streaming is not None and self.replay.num_granted < MAX_GRANTED:
            self.link.streaming.grant()
        self.link.flush()
        if self.publisher is not None:
            self.publisher.flush()
        return commits

    def run_chunks(self, count: int) -> dict[str, float]:
        """Let the collector stream at least `count` chunks at full speed; return wall time, CPU time and its memory."""
        memory = 0
        done, end, published = 0, time.monotonic() + STALLED_S, time.monotonic()
        wall, own, child = time.perf_counter(), time.process_time(), self.child_cpu_s()
        while done < count or self.replay.num_granted:
            commits = self.serve(grant=done + self.replay.num_granted < count)
            if commits:
                done, end = done + len(commits), time.monotonic() + STALLED_S
                memory = max(commits[-1].rss_bytes, commits[-1].gpu_bytes)
                continue
            self._check(end)
            if self.publisher is not None and done == 0 and time.monotonic() - published > 0.2:
                published = time.monotonic()
                self.publisher.republish()  # a subscriber that connected late missed the first weights
            self.link.wait(0.01)
        return {
            "chunks": done,
            "wall_s": time.perf_counter() - wall,
            "learner_cpu_s": time.process_time() - own,
            "collector_cpu_s": self.child_cpu_s() - child,
            "collector_gib": memory / 2**30,
        }

    def child_cpu_s(self) -> float:
        """Return the CPU seconds of the collector over all its threads, in steps of 10 ms."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def trace(self) -> dict[str, dict[int, float]]:
        """Return what `benchmarks.traced_collector` wrote: event -> number -> monotonic seconds."""
        events: dict[str, dict[int, float]] = {"commit": {}, "adopt": {}}
        for line in (self.run_dir / "trace.txt").read_text().splitlines():
            what, number, when = line.split()
            events[what][int(number)] = float(when)
        return events

    def _allocate(self, spec: StreamSpec, on_gpu: bool) -> tuple[Replay, int | None]:
        return allocate_replay(spec, self.settings, self.geometry, device=self.device, on_gpu=on_gpu)

    def _check(self, end: float) -> None:
        returncode = self._child.poll()
        if returncode is None and time.monotonic() <= end:
            return
        what = "sent no message in time" if returncode is None else f"ended with exit code {returncode}"
        output = (self.run_dir / "collector.out").read_text()[-2000:]
        raise RuntimeError(f"the collector {what}; its output ends with:\n{output}")


def per_chunk(figures: dict[str, float]) -> dict[str, Any]:
    """Return the milliseconds per chunk of the figures of `LearnerEnd.run_chunks`."""
    names = ("wall_s", "learner_cpu_s", "collector_cpu_s")
    return {f"{name[:-1]}ms": round(figures[name] / figures["chunks"] * 1e3, 4) for name in names}
