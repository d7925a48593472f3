"""The real collector or learner, which fails once at a chosen place: `faulty.py ROLE TARGET FAULT PLACE --run-dir ...`.

    TARGET   self or launch: which process the fault is for
    FAULT    the name of a signal, "exception", or "exit-0" (the process ends at once with exit code 0)
    PLACE    a phase of the process (`shared.progress`), or
             saved      the learner goes on after its first checkpoint is complete
             sending    the collector has started to copy its first chunk
             adopting   the collector takes new weights

The file `struck` beside the run folder shows that the fault has happened. The next process does not fail.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.progress import Progress


class Fault:
    """A fault that happens once in a run."""

    def __init__(self, target: str, kind: str, place: str, run_dir: Path) -> None:
        self._target, self._kind, self._place, self._struck = target, kind, place, run_dir.parent / "struck"
        self._checkpoints = run_dir / "checkpoints"

    def at(self, place: str) -> None:
        """Fail if this is the place and no process has failed before."""
        if place != self._place or self._struck.exists():
            return
        self._struck.touch()
        if self._kind == "exception":
            raise RuntimeError("a fault of the test")
        if self._kind == "exit-0":
            os._exit(0)
        os.kill(os.getpid() if self._target == "self" else os.getppid(), signal.Signals[self._kind])

    def has_checkpoint(self) -> bool:
        """Return whether a checkpoint is complete. Its files are checked and flushed while training goes on."""
        return any(self._checkpoints.glob("[0-9]*/manifest.json"))

    def at_phase(self, name: str) -> None:
        """Fail if the process has entered the phase of the place."""
        self.at(name)
        if name == "self-test":  # by now the simulator has started, so torch may be imported
            from collector_proc.chunk_sender import ChunkSender
            from collector_proc.weights_receiver import WeightsReceiver

            after(ChunkSender, "send", lambda result: self.at("sending"))
            after(WeightsReceiver, "adopt", lambda adopted: self.at("adopting") if adopted else None)


def after(owner: type, name: str, call: Callable[[Any], None]) -> None:
    """Let a method call `call` with its result before it returns."""
    method = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        call(result)
        return result

    setattr(owner, name, replaced)


def main() -> int:
    """Run the process of the role."""
    role, target, kind, place = sys.argv[1:5]
    del sys.argv[1:5]
    fault = Fault(target, kind, place, Path(sys.argv[sys.argv.index("--run-dir") + 1]))
    enter = Progress.phase

    def phase(progress: Progress, name: str) -> None:
        enter(progress, name)
        fault.at_phase(name)

    setattr(Progress, "phase", phase)  # noqa: B010 - the type checker compares the names of the arguments
    if place == "saved":
        after(Progress, "advance", lambda _: fault.at("saved") if fault.has_checkpoint() else None)
    fault.at("starting")
    if role == "learner":
        from learner_proc.__main__ import main as run

        return run()
    import collector_proc.__main__ as entry
    from collector_proc.simulators import ending

    ending.run(entry.main)


if __name__ == "__main__":
    sys.exit(main())
