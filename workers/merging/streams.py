"""Streams of a GPU: each thread has its own, so that one thread copies while another computes.

Nothing is done on a CPU, where `device` is "cpu", and torch is not loaded.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Streams:
    """A stream for each thread."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._own = threading.local()

    def own(self) -> AbstractContextManager[Any]:
        """The thread's work goes to its stream."""
        if self._device == "cpu":
            return nullcontext()
        import torch

        module = torch.get_device_module(self._device)
        if not hasattr(self._own, "stream"):
            self._own.stream = module.Stream(self._device)
        return module.stream(self._own.stream)


class Mark:
    """The work that one thread has given to its stream so far."""

    def __init__(self, device: str) -> None:
        self._device, self._event = device, None
        if device != "cpu":
            import torch

            module: Any = torch.get_device_module(device)
            self._event = module.Event()
            self._event.record(module.current_stream(device))

    def before_mine(self) -> None:
        """The stream of the calling thread does it first; the thread itself does not wait."""
        if self._event is not None:
            import torch

            torch.get_device_module(self._device).current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        """Waits until it is done."""
        if self._event is not None:
            self._event.synchronize()
