"""A CUDA driver that only listens, for tests of what is launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from peftkern.kernels import _device


class Listener:
    """A CUDA driver for sm_90 that keeps what it is given to launch."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.binaries = 0
        self.utils = SimpleNamespace(
            load_binary=self.load_binary, unload_module=lambda _module: None,
            get_device_properties=lambda _device: {"max_shared_mem": 227 << 10},
        )  # fmt: skip

    def load_binary(self, *_args: Any) -> tuple[Any, ...]:
        self.binaries += 1
        return object(), f"function {self.binaries}", 32, 0, 1024

    def launcher_cls(self, _source: Any, _metadata: Any) -> Any:
        return lambda *args: self.calls.append(args)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 1234

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @classmethod
    def active(cls, monkeypatch: pytest.MonkeyPatch, kernel: Any) -> Listener:
        """Triton's driver for the length of a test, for which `kernel` was never compiled."""
        found, caches = cls(), kernel.device_caches
        monkeypatch.setattr(kernel, "device_caches", type(caches)(caches.default_factory))
        monkeypatch.setattr(triton.runtime.driver, "_active", found)
        monkeypatch.setattr(_device, "_compiled", {})
        return found
