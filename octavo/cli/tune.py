"""`octavo tune`: a format for each layer, chosen by what each layer's K and V are measured to lose."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from octavo.cli.loading import LoadOptions
from octavo.cli.options import (
    TEXTS,
    Json,
    amount,
    budget_option,
    calibration_option,
    check_calibration,
    option,
    takes,
    tell_loading,
)
from octavo.corpus import load_texts
from octavo.errors import OctavoError, require_writable
from octavo.measure.budget import DEFAULT, Budget, Windows

if TYPE_CHECKING:
    from octavo.corpus import Texts
    from octavo.models.model import Model

# Long rather than many: the first 128 rows read no codes, and in long contexts K loses more beside V (docs/FORMATS.md).
WANTED, LEAST = Windows(2, 1024), Windows(1, 512)
SHORTEST = 256  # what --window may ask for
LAST = 2  # readings of each window that the check of the choice takes

measuring = partial(option, panel="Measuring")


@takes(LoadOptions)
def tune(
    options: LoadOptions,
    bits: Annotated[
        float | None, option("Bits of a value on average, scales included: from 4.1 to 16.", min=4, max=16)
    ] = None,
    memory: Annotated[
        str | None, option("In place of --bits: what the KV cache may take, like 4GiB.", callback=amount)
    ] = None,
    sessions: Annotated[int, option("With --memory: sessions at a time.", min=1)] = 16,
    context: Annotated[
        int | None, option("With --memory: tokens of a session. [default: the model's context]", min=2)
    ] = None,
    calibration: Annotated[Path | None, calibration_option("The formats go beside it.")] = None,
    text: Annotated[str | None, measuring(f"What is read: {TEXTS}. [default: a bundled English text]")] = None,
    data_dir: Annotated[Path | None, measuring("Where files of the named text are.")] = None,
    windows: Annotated[
        int | None, measuring(f"Windows of it. [default: {WANTED.count}, or what --budget allows]", min=1)
    ] = None,
    window: Annotated[
        int | None,
        measuring(f"Tokens in a window. [default: {WANTED.length:,}, or what --budget allows]", min=SHORTEST),
    ] = None,
    budget: Annotated[str, budget_option("--windows and --window")] = DEFAULT,
    json: Json = False,
) -> None:
    """Choose a KV cache format for each layer of MODEL, for --kv tuned.

    K and V of each layer are stored in 4 bits one at a time, and what that changes at the model's output is measured.
    Then 4, 8 and 16 bits are given out so that least is lost within the size that is asked for.
    """
    from octavo.units import parse_bytes

    if (bits is None) == (memory is None):
        raise OctavoError(
            "how large may the cache be? Give --bits 5, or --memory 4GiB with --sessions and --context: one of them"
        )
    room, time = parse_bytes(memory or "0"), Budget.parse(budget)
    check_calibration(calibration, None, None)
    texts = load_texts(text, data_dir)
    next(iter(texts))  # refuses what cannot be read
    tell_loading(options.model)
    import torch

    model = options.load(torch.float32, told=True, pairs=False)  # bf16's rounding would hide what one side loses
    from octavo.cli.progress import calibration_with_bar, telling
    from octavo.cli.tables.tune import show
    from octavo.measure.as_json import dumps
    from octavo.measure.tune.choice import token_budget, token_room
    from octavo.measure.tune.sensitivity import measure, readings
    from octavo.measure.tune.tuning import tune as choose
    from octavo.quant.format import KVFormat

    bound, where = model.bound, _directory(model, calibration)
    require_writable(where, "--calibration")
    if bits is not None:
        size = token_budget(bound, bits)
    else:
        size = token_room(bound, room, sessions, context or bound.max_context)
    known = calibration_with_bar(model, calibration, KVFormat.parse("kv4"))
    name, pieces = _windows(model, texts, windows, window, time)
    start, work, done = perf_counter(), len(pieces) * (readings(bound) + LAST), count(1)
    with telling("measuring") as tell:

        def step() -> None:
            tell("storing one side of one layer in 4 bits", next(done), work)

        def go_on(taken: int) -> bool:
            return windows is not None or time.holds_another(start, taken)

        found = measure(bound, known, pieces, go_on, step)
        chosen = choose(bound, known, found, size, pieces[: found.windows], name, step)
        tell("storing one side of one layer in 4 bits", work, work)
    path = chosen.artefact(model.fingerprint).save(where)
    if json:
        print(dumps({"command": "tune", "model": model.name, **chosen.document(), "saved": str(path)}))
        return
    show(chosen)
    print(f"saved to {path}\n{options.next('tuned', calibration)}")


def _directory(model: Model, given: Path | None) -> Path:
    """Where the formats are saved."""
    if model.synthetic:
        raise OctavoError("--load-format dummy: random weights have no layers to tell apart")
    if given is None:
        return model.work_dir
    return given if given.is_dir() else given.parent


def _windows(
    model: Model, texts: Texts, count: int | None, length: int | None, budget: Budget
) -> tuple[str, list[list[int]]]:
    """The text's name, and windows of it: those asked for, or what the budget allows. Says how long it takes."""
    from octavo.cli.progress import say
    from octavo.measure.pace import Pace
    from octavo.measure.tune.sensitivity import readings
    from octavo.text_windows import token_windows

    bound, work = model.bound, readings(model.bound) + LAST
    longest = min(WANTED.length, bound.max_context)
    wanted = Windows(count or WANTED.count, length or longest)
    if wanted.length > bound.max_context:
        raise OctavoError(f"a window of {wanted.length} tokens is longer than the model's context, {bound.max_context}")
    least = Windows(count or LEAST.count, length or min(LEAST.length, longest))
    pace = Pace.measure(bound, wanted.length)
    fit = budget.fit(wanted, least, lambda size: pace.read(size.tokens, logits=True) * work)
    say(f"{work} readings of {fit}")
    return texts.name, list(token_windows(texts, model.tokenizer, fit.size.count, fit.size.length))
