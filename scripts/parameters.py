"""Write docs/PARAMETERS.md from the table of request parameters in octavo/engine/params.py."""

from __future__ import annotations

from pathlib import Path

from octavo.engine.params import DEFAULTS, EVERYWHERE, TABLE

PAGE = Path(__file__).parent.parent / "docs" / "PARAMETERS.md"
HEAD = """# Request parameters

Made from `octavo/engine/params.py` by `python scripts/parameters.py`. Names are the same everywhere: fields of
`SamplingParams` in Python, of a line of `octavo generate --input`, and of a request over HTTP; on the command line
`max_tokens` is `--max-tokens`, and what is true or false is turned on by `--ignore-eos` and off by `--no-ignore-eos`.
What is not given is as the model's generation config asks, else as here. Over HTTP, chat has `logprobs` and
`top_logprobs` in OpenAI's form, and what answers match has several names ([the server](SERVE.md)).

| parameter | it must be | default | not on | meaning |
|---|---|---|---|---|
"""


def page() -> str:
    rows = []
    for name, rule in TABLE.items():
        default = DEFAULTS[name]
        shown = "none" if default in (None, (), {}) else str(default).lower()
        missing = ", ".join(place for place in EVERYWHERE if place not in rule.where)
        named = f"`{name}`" + (f" (`{rule.flag}`)" if rule.flag else "")
        rows.append(f"| {named} | {rule.kind.expected} | {shown} | {missing} | {rule.help} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
