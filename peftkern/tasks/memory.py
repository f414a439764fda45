"""Peak memory of a piece of work, as the operating system or the device counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak bytes between construction and `bytes()`.

    On CUDA: what the allocator held at most. Elsewhere: the largest resident set of this process, weights, Python and
    libraries included; where Linux allows it the mark is reset at construction, otherwise it counts from the start of
    the process. Memory that earlier work in the process left behind counts too, so compare runs of a process each.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            _CLEAR.write_text("5")
        except OSError:
            pass

    @property
    def kind(self) -> str:
        """What is counted, for tables."""
        return "CUDA allocator" if self._cuda else "resident set of the process"

    def bytes(self) -> int:
        """The peak so far."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
