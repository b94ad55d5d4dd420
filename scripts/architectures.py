"""Write docs/ARCHITECTURES.md: which of transformers' language models Octavo serves, as the tests' probe finds it.

Run from anywhere, takes half a minute; a test fails when the page and the probe differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ARCHITECTURES.md"
sys.path.insert(0, str(ROOT))  # the tests are no installed package

from tests.models import recurrent, zoo  # noqa: E402
from tests.models.forms import FORMS, measure  # noqa: E402
from tests.models.probe import Outcome, probe  # noqa: E402

INTRODUCTION = """\
# Architectures

Octavo runs any model that sends its attention through transformers' `AttentionInterface` and keeps other states than K
and V, if any, through transformers' interface for recurrent layers. What it cannot run exactly it refuses when the
model is loaded, with the reason. This page is the list, found with transformers {version}.
`python scripts/architectures.py` writes it and a test keeps it true.

Each architecture is built as a tiny random float32 model with its features switched on. Sequences of different lengths
are packed into steps of prefill, decode and both, over a paged cache in the `fp32` format, and the logits compared with
the model's own eager attention over each sequence alone. *Exact* is a difference within float32 rounding. A name such
as `llama+yarn` is an architecture with one more feature. A checkpoint may switch on what its architecture has switched
off here; the refusals look at the model that is loaded, not at this list.

| result | models |
|---|---|
| exact | {exact} |
| refused, with a reason | {refused} |
| accepted but wrong | {wrong} |
| not built, so not known | {not_built} |
"""

GIVEN = """\
What can be given as MODEL, each tried as a tiny model on disk: it is loaded, a text is read through a cache of `fp32`,
and the greedy tokens and the log-probabilities are compared with those of transformers' eager attention over the
weights that the form stands for, in float32. Weights that stay in 4 bits are multiplied with inputs in 15 bits.
"""

FEATURES = """\
What their layers have, as the dry run at load sees it. *GQA*: fewer KV heads than query heads. *window*: sliding, in
some layers or in all. *K and V of different dims*: latent attention (MLA) in its expanded form, stored per head: right,
but not small. *own scale*: other than 1/√dim. *KV-shared layers* store nothing of their own. *states*: some layers, or
all, keep states of fixed size.
"""


RECURRENT = """\
Of models whose layers are partly or all recurrent, each tried as above and once more: eight prompts of 1 to 40 tokens
at a time through the engine, and the greedy answers of 12 tokens compared with those of transformers, each prompt
alone, with its own cache and eager attention in float32: with its `generate`, token by token, and with one forward over
prompt and answer. Models without any attention run too: their cache has no rows to fold, and every format is the same.

Of `nemotron_h` and `zamba2` transformers computes two models: a forward over several tokens keeps every time step
above the config's `time_step_min`, and one over a single token does not. So its `generate` differs from its own
forward, by as much as from ours. Octavo computes the forward's, in all steps: what a token leaves behind must not
depend on how many were computed together.
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole text."""
    by_verdict = {v: [o for o in outcomes if o.verdict == v] for v in ("exact", "refused", "wrong")}
    by_features: dict[tuple[str, ...], list[str]] = {}
    for outcome in by_verdict["exact"]:
        by_features.setdefault(outcome.features, []).append(outcome.name)
    introduction = INTRODUCTION.format(
        version=transformers.__version__,
        not_built=len(zoo.NOT_BUILT),
        **{verdict: len(found) for verdict, found in by_verdict.items()},
    )
    parts = [
        introduction,
        "## Forms\n\n" + GIVEN,
        table(("form", "tokens", "log-probabilities differ by", "bytes a token in `kv8`"), forms_rows()),
        "## Recurrent layers\n\n" + RECURRENT,
        table(
            (
                "model type",
                "tokens",
                "log-probabilities differ from a forward's by",
                "from `generate`'s by",
                "bytes of a session's states",
            ),
            recurrent_rows(),
        ),
        "## Exact\n\n" + FEATURES,
        table(
            ("features", "architectures"),
            ((", ".join(key) or "none of these", code(found)) for key, found in sorted(by_features.items())),
        ),
        "Model types that share a class with one of these share its result: "
        + ", ".join(f"`{alias}` ({name})" for alias, name in zoo.aliases().items())
        + ".\n",
    ]
    if by_verdict["wrong"]:
        parts += ["## Accepted but wrong\n", table(("architecture",), ((code([o.name]),) for o in by_verdict["wrong"]))]
    parts += [
        "## Refused\n",
        table(("architecture", "reason"), ((code([o.name]), o.reason) for o in by_verdict["refused"])),
        "## Not built\n",
        table(("architecture", "reason"), ((code([name]), reason) for name, reason in sorted(zoo.NOT_BUILT.items()))),
    ]
    return "\n".join(parts)


def forms_rows() -> Iterable[tuple[str, ...]]:
    for name in FORMS:
        found = measure(name)
        bound = next(limit for limit in (1e-4, 1e-3, 1e-2, 1e9) if found.error < limit)
        yield name, "equal" if found.tokens else "differ", f"less than {bound:g}", f"{found.token_bytes:,}"


def recurrent_rows() -> Iterable[tuple[str, ...]]:
    for name in recurrent.NAMES:
        found = recurrent.measure(name)
        if found.reason:
            yield f"`{name}`", "refused", found.reason.removeprefix(f"{name} "), "", ""
        else:
            bounds = [next((limit for limit in (1e-4, 1e-3, 1e-2) if error < limit), float("inf"))
                      for error in (found.error, found.by_token)]  # fmt: skip
            within = (f"less than {bound:g}" for bound in bounds)
            yield f"`{name}`", "equal" if found.tokens else "differ", *within, f"{found.states:,}"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)


def code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def main() -> None:
    torch.set_num_threads(1)  # the models are too small to share
    transformers.logging.set_verbosity_error()
    outcomes = [probe(name) for name in zoo.names()]
    PAGE.write_text(page(outcomes))
    for verdict in ("exact", "refused", "wrong"):
        print(f"{verdict}: {sum(outcome.verdict == verdict for outcome in outcomes)}")


if __name__ == "__main__":
    main()
