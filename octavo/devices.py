"""What depends on the kind of device that a model is on, as a value: memory, copies, and whether it works on its own.

Nothing else asks for a device's kind. Which kernels read a cache there is attention's (attention/backend.py), and which
multiply weights is weights/cpu.py's.
"""

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from octavo.errors import OctavoError

HOST = torch.device("cpu")
KEPT = {-1: 128 << 20, -3: 32 << 20}  # malloc.h: M_TRIM_THRESHOLD, of all memory, and M_MMAP_THRESHOLD, of one tensor


class Device:
    """The CPU: its memory is that of this process, and it computes when it is called."""

    asynchronous = False  # whether it works on its own once a step is launched
    dedicated = False  # whether its memory is there for the model alone, so that a cache takes all of its share
    cache_share = 0.5  # of the memory that is free once the model is loaded, unless said otherwise
    measures = "resident set of a process of its own"  # what `taken` and `peak` are of

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def name(self) -> str:
        return str(self.device)

    @property
    def generators(self) -> list[torch.device]:
        """Devices with random states of their own, beside the host's."""
        return []

    def free_memory(self) -> int:
        """Bytes that can still be allocated."""
        return psutil.virtual_memory().available

    def memory(self) -> int:
        """Bytes that a model and its cache can have, were nothing loaded yet. Allocates nothing."""
        return self.free_memory()

    def trim(self) -> None:
        """Give back to the system what the allocator keeps for later."""

    def keep(self) -> None:
        """Have the allocator keep what a step's temporaries took for the next step.

        glibc gives freed memory of some megabytes back to the system at once, and takes it anew page by page.
        """
        with suppress(AttributeError, TypeError):  # other systems have no such function, or no such library
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, limit in KEPT.items():
                mallopt(parameter, limit)

    def taken(self) -> int:
        """Bytes that this process has taken."""
        return psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most that it had taken since `forget_peak`."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return self.taken()
        kibibytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
        return max(kibibytes << 10, self.taken())

    def forget_peak(self) -> None:
        with suppress(OSError):  # elsewhere than on Linux the peak is what is found at the end
            Path("/proc/self/clear_refs").write_text("5")

    def in_use(self) -> int | None:
        """Bytes in use by all processes by the driver's count, where there is a driver."""
        return None

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros. On the host it is address space: the system gives a page of memory when it is first
        written, and takes all of them back when the tensor is freed."""
        size = math.prod(shape)
        if not size:
            return torch.zeros(*shape, dtype=dtype)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, **private), dtype=dtype).view(*shape)

    def pinned(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies from and to on its own."""
        return torch.empty(shape, dtype=dtype)

    def send(self, x: Tensor) -> Tensor:
        """A tensor of the host on the device; neither waits for the other."""
        return x.to(self.device)

    def fetch(self, x: Tensor) -> Tensor:
        """A copy on the host that is complete once the device has come to it."""
        return x

    def mark(self) -> Callable[[], None]:
        """What waits until the device has done all that is queued now."""
        return lambda: None


class Gpu(Device):
    """An NVIDIA GPU."""

    asynchronous = dedicated = True
    cache_share = 0.8
    measures = "PyTorch's allocator"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def generators(self) -> list[torch.device]:
        return [self.device]

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def memory(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def taken(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        self.trim()
        torch.cuda.reset_peak_memory_stats(self.device)

    def in_use(self) -> int | None:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Taken at once: graphs of steps keep its address, and no other memory is free for it later."""
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def pinned(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with torch.cuda.device(self.device):  # else it is pinned for the current device, which may be another
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    def send(self, x: Tensor) -> Tensor:
        return self.pinned(x.shape, x.dtype).copy_(x).to(self.device, non_blocking=True)

    def fetch(self, x: Tensor) -> Tensor:
        return self.pinned(x.shape, x.dtype).copy_(x, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize


KINDS = {"cpu": Device, "cuda": Gpu}


@cache
def device_of(device: torch.device) -> Device:
    """The value for a device of torch; a kind that is not known counts as the host."""
    return KINDS.get(device.type, Device)(device)


def send(x: Tensor, device: torch.device) -> Tensor:
    """As `Device.send`."""
    return device_of(device).send(x)


def find_device(name: str) -> torch.device:
    """The device of that name, for auto a GPU if there is one; raises OctavoError if it cannot be used here."""
    gpu = torch.cuda.is_available()
    try:
        found = torch.device(("cuda" if gpu else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise OctavoError(f"there is no device {name!r}: name auto, cpu, cuda or cuda:1") from None
    if found.type not in KINDS or (KINDS[found.type] is Gpu and (found.index or 0) >= torch.cuda.device_count()):
        raise OctavoError(f"the device {name!r} cannot be used here: name auto, cpu, cuda or cuda:1")
    return HOST if found.type == "cpu" else found  # which may have been named cpu:0
