"""Where a number was measured: what every result says of its machine and versions."""

import platform
from datetime import date
from typing import Any

import psutil
import torch
import transformers

import octavo
from octavo import processor
from octavo.devices import device_of


def describe(device: torch.device) -> dict[str, Any]:
    """Date, device, processor, threads, memory and versions, ready for JSON."""
    generation = f" ({processor.name()})" if processor.name() != processor.full_name() else ""
    return {
        "date": date.today().isoformat(),
        "device": device_of(device).name,
        "processor": processor.full_name() + generation,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "octavo": octavo.__version__,
    }


def sentence(machine: dict[str, Any]) -> str:
    """The same in one line for people."""
    where = machine["processor"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['processor']}"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{where}, {threads} ({machine['instructions']}), torch {machine['torch']}, {machine['date']}"
