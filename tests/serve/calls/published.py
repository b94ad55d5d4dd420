"""What chat templates of several families say of tools, as they are published: calls, results, and what they refuse. Of
each, `templates/` has what has to do with tools; the prose that explains them to the model is shortened."""

from __future__ import annotations

from pathlib import Path

FILES = {
    "Hermes": "qwen2.5",
    "Llama 3": "llama3.1",
    "Mistral": "mistral-v3",
    "Mistral (tokenizer version 11)": "mistral-v11",
    "Gemma 4": "gemma4",
    "InternLM": "internlm2",
    "plain JSON": "other",
}
FAMILIES = {
    family: (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    for family, name in FILES.items()
}
