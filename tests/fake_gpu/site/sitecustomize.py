"""Turn the operators of the fake GPU on in every process of Python that imports torch. See ../README.md."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Import torch as usual, then the operators."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            from tests.fake_gpu import operators

            operators.install()

        loader.exec_module = execute_and_install
        return spec


if os.environ.get("FAKE_GPU_OPERATORS"):
    sys.meta_path.insert(0, _AfterTorch())
