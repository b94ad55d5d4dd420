"""Options that several verbs share, each said once, and the checks of what is given."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from octavo.errors import OctavoError, did_you_mean
from octavo.quant.format import CODECS, DEFAULT_GRANULARITY, DEFAULT_HEADROOM, NAMES, RAW_NAMES, TUNED, validate_choice
from octavo.units import parse_bytes

if TYPE_CHECKING:
    from octavo.ray.measuring import Workers


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OctavoError(f"{flag} {value}: {did_you_mean(value, choices)}choose {', '.join(choices)}")


def check_file(flag: str, path: Path) -> None:
    if not path.is_file():
        raise OctavoError(f"{flag} {path}: there is no such file")


def check_model(model: str | None) -> None:
    """Raise OctavoError for what names no model, here or on the Hub."""
    from octavo.models.locate import is_bundled, require_known

    if is_bundled(model):
        return
    if " " in str(model) and not os.path.exists(str(model)):  # which bears a prompt longer than a name can be
        told = shorten(str(model), 60, placeholder=" …")
        raise OctavoError(f"{told!r} is no model: the prompt comes after MODEL, or goes after --prompt")
    require_known(str(model))


def check_calibration(file: Path | None, granularity: str | None, headroom: float | None) -> None:
    if file is not None and not file.exists():
        raise OctavoError(f"there is no calibration at {file}; make it with `octavo calibrate`")
    validate_choice(granularity or DEFAULT_GRANULARITY, DEFAULT_HEADROOM if headroom is None else headroom)


def tell_loading(model: str | None) -> None:
    """The first line of a command, while torch is still imported."""
    from octavo.models.locate import BUNDLED, find_here, is_bundled

    path = BUNDLED if is_bundled(model) else find_here(str(model))
    files = [] if path is None else [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    size = sum(file.stat().st_size for file in files) / 2**20
    weights = "from the Hub" if path is None else f"{size:,.0f} MiB of weights"
    print(f"loading {model or BUNDLED.name}: {weights}", file=sys.stderr, flush=True)


def amount(text: str | None) -> str | None:
    """Callback of an option that names an amount of memory, which is checked before torch is imported."""
    if text is not None:
        parse_bytes(text)
    return text


def option(help: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


of_model = partial(option, panel="Model and cache")


TEXTS = "a .txt or .jsonl file, or ptb, c4, wikitext2, pileval"


def calibration_option(more: str) -> Any:
    return of_model(f"File or directory of the calibration. {more}", "--calibration", "--work-dir")


def complete(incomplete: str) -> list[str]:
    """Formats that --kv may go on with, for the shell; of several with commas between, the last."""
    known, _, last = incomplete.rpartition(",")
    names = (*NAMES, TUNED, *CODECS)
    return [f"{known},{name}" if known else name for name in names if name.startswith(last)]


ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A directory, Hub id or .gguf file. [default: the bundled model]", show_default=False
    ),
]


def _one_of(flag: str, help: str, *choices: str) -> Any:
    """An option whose value is one of these, which is known before torch is imported."""

    def check(value: str) -> str:
        check_choice(flag, value, choices)
        return value

    def told(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return of_model(help, callback=check, autocompletion=told)


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise OctavoError(f"--device: there is no device {name!r}; name auto, cpu, cuda or cuda:1")
    return name


ModelFormat = Annotated[str, _one_of("--model-format", "How the weights are stored: hf, awq.", "hf", "awq")]
Dtype = Annotated[
    str, _one_of("--dtype", "Type: auto (the checkpoint's), bf16, fp16, fp32.", "auto", *RAW_NAMES.values(), *RAW_NAMES)
]
DeviceName = Annotated[
    str, of_model("Where it runs: auto (a GPU if there is one), cpu, cuda, cuda:1, …", callback=_device)
]
LoadFormat = Annotated[
    str, _one_of("--load-format", "Weights: auto, or dummy for random ones of the config's shape.", "auto", "dummy")
]
ChatTemplate = Annotated[Path | None, of_model("A Jinja file in place of the model's template.")]
CalibrationPath = Annotated[Path | None, calibration_option("[default: beside the model]")]
CalibrationDir = Annotated[
    Path | None, option("Where the calibration is saved. [default: the model's directory, or a cache]", "--work-dir")
]
OtherGranularity = Annotated[
    str | None, of_model("Of int8: values that share a scale, tensor, head or channel. [default: the calibration's]")
]
OtherHeadroom = Annotated[float | None, of_model("Of int8: range stored over range seen. [default: the calibration's]")]
Json = Annotated[bool, option("One JSON document on stdout.", "--json")]
Ray = Annotated[
    str | None,
    option("Work on a Ray cluster: its address, like auto or 10.0.0.1:6379; local starts one here.", panel="Ray"),
]
Replicas = Annotated[
    int | None,
    option("Copies of the model on the cluster. [default: one on each GPU, or on each machine]", min=1, panel="Ray"),
]


def check_replicas(ray: str | None, replicas: int | None) -> None:
    if replicas is not None and ray is None:
        raise OctavoError("--replicas are on a Ray cluster: name it with --ray, or start one here with --ray local")
    if ray is not None:
        from octavo.ray.cluster import require

        require("--ray")


@contextmanager
def on_ray(address: str | None, replicas: int | None, device: str) -> Iterator[Workers | None]:
    """Models on the cluster that --ray names; None without one."""
    if address is None:
        yield None
        return
    from octavo.ray.cluster import cluster, placement

    with cluster(address):
        from octavo.ray.measuring import Workers

        yield Workers(placement(replicas, device))


def budget_option(counts: str = "") -> Any:
    """--budget of a verb that measures; `counts` are the options that leave it nothing to choose."""
    told = "Time for the work, like 90s, 2m or 1h30m: as much is measured as fits; none: as much as is of use."
    return option(f"{told} {counts} override it." if counts else told, "--budget")


def numbers(text: str, name: str) -> list[int]:
    """'1,8' → [1, 8]; raises OctavoError for anything but whole numbers of at least 1."""
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise OctavoError(f"{name} takes whole numbers with commas between, like 1,8; not {text!r}")
    return found


def takes(*kinds: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: a command `f(a, b, …own)` takes the fields of the dataclasses `kinds` (A, B) as arguments and options
    of its own, and gets an A and a B, each of which has checked itself if it can. Its own required arguments come
    first, then theirs."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(kinds) :]
        shared = []
        for kind in kinds:
            hints = get_type_hints(kind, include_extras=True)
            shared += [
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
                for f in fields(kind)
            ]

        @wraps(command)
        def run(**values: Any) -> None:
            chosen = [kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for kind in kinds]
            for part in chosen:
                if hasattr(part, "check"):
                    part.check()
            command(*chosen, **values)

        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        required = [p for p in own if p.default is inspect.Parameter.empty]
        merged = [*required, *shared, *(p for p in own if p not in required)]
        run.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in merged}
        return run

    return decorate
