"""The stub of Kit for tier B: modules with which Isaac Lab's own Python layer can be imported and run without Kit.

AppLauncher imports this module first. From then on, every other module of Kit can be imported, and a toy simulator
(toy_physics.py) takes the place of the real one in Isaac Lab's environments. Nothing else of Isaac Lab is replaced.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

ROOTS = {"carb", "omni", "pxr", "usdrt", "isaacsim", "cv2", "nvidia", "warp_fallback"}
SWAPPED = {
    "isaaclab.envs.manager_based_env",
    "isaaclab.envs.direct_rl_env",
    "isaaclab_tasks.direct.cartpole.cartpole_env",
}
VERSION = ("5.1.0", "", "5", "1", "0", "", "", "")
SEEN_ARGV: list[list[str]] = []
os.environ.setdefault("EXP_PATH", os.path.dirname(__file__))
builtins.ISAAC_LAUNCHED_FROM_TERMINAL = False  # pyright: ignore[reportAttributeAccessIssue]
__path__: list[str] = []


class _AnyMeta(type):
    """The type of a class whose attributes are again such classes, and whose objects are `Anything`."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyMeta(name, (Anything,), {})
        setattr(cls, name, made)
        return made

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls

    def __int__(cls) -> int:
        return 0

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class Anything(metaclass=_AnyMeta):
    """An object that can be called, indexed, entered and iterated. The result is again such an object, or empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept all arguments."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Anything()

    def __getitem__(self, key: Any) -> Any:
        return Anything()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def __bool__(self) -> bool:
        return False

    def __int__(self) -> int:
        return 0

    def __len__(self) -> int:
        return 0


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyMeta(name, (Anything,), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Creates stub modules, and puts the toy simulator into the environments' modules after their import."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.split(".")[0] in ROOTS and fullname not in sys.modules:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname in SWAPPED:
            return _swapping(fullname, path)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _StubModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "isaacsim.core.version":
            module.get_version = lambda: VERSION  # pyright: ignore[reportAttributeAccessIssue]


class _Swapping(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        import toy_physics

        toy_physics.replace_simulator(module)


def _swapping(fullname: str, path: Sequence[str] | None) -> Any:
    spec = importlib.machinery.PathFinder.find_spec(fullname, path)
    assert spec is not None, fullname
    spec.loader = _Swapping(spec.loader)
    return spec


class SimulationApp:
    """The application that AppLauncher creates. Like Kit, it handles SIGINT and reads all arguments."""

    def __init__(self, launch_config: dict | None = None, experience: str = "") -> None:
        self.config = launch_config
        SEEN_ARGV.append(list(sys.argv))
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))

    def _start_app(self) -> None:
        return None

    def is_running(self) -> bool:
        return True

    def close(self) -> None:
        os._exit(0)


sys.meta_path.insert(0, _Finder())
