"""`/params`: which sampling parameters are in force, and who has set them."""

from collections.abc import Collection

from octavo.engine.params import DEFAULTS, SamplingParams, allowed
from octavo.llm import LLM

ALWAYS = ("max_tokens", "temperature")  # others are shown where they change something
Row = tuple[str, str, str]


def in_force(params: SamplingParams, llm: LLM, given: Collection[str]) -> list[Row]:
    """(name, value, where it comes from) of every parameter that changes what is drawn or shown. `given` are those
    that the command line has set."""
    model = llm.default_params
    asked = {"max_tokens" if name == "max_new_tokens" else name for name in llm.model.generation}
    rows = []
    for name in allowed("command line"):
        value = getattr(params, name)
        if value == DEFAULTS[name] and name not in (*ALWAYS, *given):
            continue
        if name in given:
            source = "the command line"
        elif name in asked and value == getattr(model, name):
            source = "the model's generation config"
        elif name == "max_tokens" and value == llm.session_len:
            source = "what a session holds"
        else:
            source = "default"
        rows.append((name, _shown(name, value), source))
    return rows


def _shown(name: str, value: object) -> str:
    if name == "temperature" and not value:
        return "0: greedy, always the most likely token"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
