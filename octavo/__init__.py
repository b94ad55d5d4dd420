"""Octavo: calibrated int8 KV caches for Hugging Face language models."""

from octavo.errors import OctavoError, Unsupported

__version__ = "0.1.0"
__all__ = ["LLM", "KVFormat", "OctavoError", "SamplingParams", "Unsupported", "__version__", "attach"]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import; `octavo --help` needs neither.
    if name == "LLM":
        from octavo.llm import LLM

        return LLM
    if name == "SamplingParams":
        from octavo.engine.params import SamplingParams

        return SamplingParams
    if name == "KVFormat":
        from octavo.quant.format import KVFormat

        return KVFormat
    if name == "attach":
        from octavo.attachment import attach

        return attach
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")
