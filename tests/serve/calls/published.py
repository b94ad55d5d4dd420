"""Chat templates of the families whose calls are known.

`templates/` has texts of our own, so that no model's licence binds this repository: what they write of calls and of
their results is what the published ones write, and the prose that explains tools to the model is shorter. The published
ones, each under its model's licence, come in the source release of a package, which `make test-clients` downloads;
tests/clients/test_templates.py compares the two, and reads and holds calls by the published ones too. Of models that it
has no template of, DOCUMENTED has what their publishers show of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "templates"
ORIGINALS = Path(".clients/templates")


@dataclass(frozen=True)
class Published:
    """A template, and the model that it is of."""

    family: str  # of the syntax
    file: str
    original: str | None  # the published one, among ORIGINALS; None where that has none of this model

    @property
    def text(self) -> str:
        return (HERE / f"{self.file}.jinja").read_text(encoding="utf-8").removesuffix("\n")

    @property
    def published(self) -> str | None:
        """The published text, if it is here."""
        path = ORIGINALS / f"{self.original}.jinja"
        return path.read_text(encoding="utf-8") if self.original and path.exists() else None


TEMPLATES = {
    "Qwen2.5": Published("Hermes", "qwen2.5", "Qwen-Qwen2.5-7B-Instruct"),
    "Qwen3": Published("Hermes", "qwen3", "Qwen-Qwen3-0.6B"),
    "Llama 3.1": Published("Llama 3", "llama3.1", "meta-llama-Llama-3.1-8B-Instruct"),
    "Llama 3.2": Published("Llama 3", "llama3.2", "meta-llama-Llama-3.2-3B-Instruct"),
    "Mistral 7B v0.3": Published("Mistral", "mistral-v3", None),
    "Mistral Nemo": Published("Mistral", "mistral-nemo", "mistralai-Mistral-Nemo-Instruct-2407"),
    "Ministral 3": Published(
        "Mistral (tokenizer version 11)", "mistral-v11", "mistralai-Ministral-3-14B-Reasoning-2512"
    ),
    "Gemma 4": Published("Gemma 4", "gemma4", "google-gemma-4-31B-it"),
    "FunctionGemma": Published("FunctionGemma", "functiongemma", None),
    "InternLM 2.5 and 3": Published("InternLM", "internlm", None),
    "another": Published("plain JSON", "other", None),
}
# Of a model: the function that is called, its arguments, and the call as its publisher writes it.
DOCUMENTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "InternLM 2.5 and 3": (  # github.com/InternLM/InternLM, chat/chat_format.md
        "get_current_weather",
        {"location": "Shanghai"},
        '<|action_start|><|plugin|>\n{"name": "get_current_weather", "parameters": {"location": "Shanghai"}}'
        "<|action_end|>",
    ),
    "FunctionGemma": (  # ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
        "get_current_temperature",
        {"location": "Paris", "unit": "celsius"},
        "<start_function_call>call:get_current_temperature"
        "{location:<escape>Paris<escape>,unit:<escape>celsius<escape>}<end_function_call>",
    ),
    "Mistral 7B v0.3": (  # github.com/mistralai/cookbook, concept-deep-dive/tokenization/tool_calling.md; another id
        "calculator",
        {"operation": "2+2", "format": "celsius"},
        '[TOOL_CALLS] [{"name": "calculator", "arguments": {"operation": "2+2", "format": "celsius"}, '
        '"id": "abcdefgh1"}]',
    ),
}
FAMILIES = {
    "Hermes": TEMPLATES["Qwen2.5"].text,
    "Llama 3": TEMPLATES["Llama 3.1"].text,
    "Mistral": TEMPLATES["Mistral 7B v0.3"].text,
    "Mistral (tokenizer version 11)": TEMPLATES["Ministral 3"].text,
    "Gemma 4": TEMPLATES["Gemma 4"].text,
    "FunctionGemma": TEMPLATES["FunctionGemma"].text,
    "InternLM": TEMPLATES["InternLM 2.5 and 3"].text,
    "plain JSON": TEMPLATES["another"].text,
}
