"""Octavo: KV caches in 8 and 4 bits for Hugging Face language models."""

from importlib import import_module
from typing import TYPE_CHECKING

from octavo.errors import OctavoError, Unsupported

if TYPE_CHECKING:
    from octavo.attachment import attach
    from octavo.engine.params import SamplingParams
    from octavo.llm import LLM
    from octavo.quant.format import KVFormat

__version__ = "0.1.0"
__all__ = ["LLM", "KVFormat", "OctavoError", "SamplingParams", "Unsupported", "__version__", "attach"]

# torch and transformers take seconds to import, and `octavo --help` needs neither: imported when they are used.
LAZY = {
    "LLM": "octavo.llm",
    "KVFormat": "octavo.quant.format",
    "SamplingParams": "octavo.engine.params",
    "attach": "octavo.attachment",
}


def __getattr__(name: str) -> object:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
