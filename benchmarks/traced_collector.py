"""The real collector, which also records when it sends a commit and when it adopts weights.

Run it as `python -m benchmarks.traced_collector --run-dir DIR ...`, like `python -m collector_proc`. It writes one line
per event to DIR/trace.txt: the event, its number (the commit's seq or the policy version), and time.monotonic() in
seconds. Like the collector, it imports torch only after the simulator has started.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import collector_proc.__main__ as entry
from shared.handover import Channel
from shared.messages import Commit

if TYPE_CHECKING:
    from shared.messages import Message


def main() -> int:
    """Run the collector process with tracing."""
    run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    trace = (run_dir / "trace.txt").open("w", buffering=1)
    build, connect = entry.build_simulator, entry.connect

    def connect_and_trace(*args, **kwargs) -> Channel:
        return _TracedChannel(connect(*args, **kwargs), trace)

    def build_and_trace(*args, **kwargs):
        simulator = build(*args, **kwargs)
        _trace_adoption(trace)  # imports torch, which is allowed now
        return simulator

    entry.connect, entry.build_simulator = connect_and_trace, build_and_trace
    return entry.main()


class _TracedChannel(Channel):
    """Records every commit, with the time just before it was sent."""

    def __init__(self, channel: Channel, trace: TextIO) -> None:
        super().__init__(channel._socket)
        self._trace = trace

    def send(self, message: Message, *args, **kwargs) -> None:
        now = time.monotonic()
        super().send(message, *args, **kwargs)
        if isinstance(message, Commit):
            self._trace.write(f"commit {message.seq} {now:.6f}\n")


def _trace_adoption(trace: TextIO) -> None:
    """Record every policy version just after it was adopted."""
    from collector_proc.weights_receiver import WeightsReceiver

    adopt = WeightsReceiver.adopt

    def traced(self: WeightsReceiver) -> bool:
        adopted = adopt(self)
        if adopted:
            trace.write(f"adopt {self.version} {time.monotonic():.6f}\n")
        return adopted

    WeightsReceiver.adopt = traced


if __name__ == "__main__":
    sys.exit(main())
