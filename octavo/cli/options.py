"""The options that verbs share, and what they become: a model, an LLM."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from octavo.errors import OctavoError
from octavo.quant.format import (
    CODECS,
    DEFAULT_GRANULARITY,
    DEFAULT_HEADROOM,
    NAMES,
    RAW_NAMES,
    TUNED,
    check_name,
    validate_choice,
)

if TYPE_CHECKING:
    import torch

    from octavo.llm import LLM
    from octavo.models.model import Model
    from octavo.ray.cluster import Placement

# `--quant-policy` of LMDeploy's page, where 4 meant int8; 8 is what LMDeploy calls int8 today.
QUANT_POLICY = {0: None, 4: "int8", 8: "int8"}


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = get_close_matches(value, choices, n=1)
        raise OctavoError(f"{flag} {value}: {f'did you mean {near[0]}? ' if near else ''}choose {', '.join(choices)}")


def check_file(flag: str, path: Path) -> None:
    if not path.is_file():
        raise OctavoError(f"{flag} {path}: there is no such file")


def check_model(model: str | None) -> None:
    """Raise OctavoError for what names no model, here or on the Hub."""
    from octavo.models.locate import is_bundled, require_known

    if is_bundled(model):
        return
    if " " in str(model) and not Path(str(model)).exists():
        raise OctavoError(f"{model!r} is no model: the prompt comes after MODEL, or goes after --prompt")
    require_known(str(model))


def check_calibration(file: Path | None, granularity: str | None, headroom: float | None) -> None:
    if file is not None and not file.exists():
        raise OctavoError(f"there is no calibration at {file}; make it with `octavo calibrate`")
    validate_choice(granularity or DEFAULT_GRANULARITY, DEFAULT_HEADROOM if headroom is None else headroom)


def tell_loading(model: str | None) -> None:
    """The first line of a command, while torch is still imported."""
    from octavo.models.locate import BUNDLED, find_here, is_bundled

    path = BUNDLED if is_bundled(model) else find_here(str(model))
    files = [] if path is None else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    size = sum(file.stat().st_size for file in files) / 2**20
    weights = "from the Hub" if path is None else f"{size:,.0f} MiB of weights"
    print(f"loading {model or BUNDLED.name}: {weights}", file=sys.stderr, flush=True)


def option(help: str, *names: str, panel: str = "Model and cache", **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def complete(incomplete: str) -> list[str]:
    """Formats that --kv may go on with, for the shell; of several with commas between, the last."""
    known, _, last = incomplete.rpartition(",")
    names = (*NAMES, TUNED, *CODECS)
    return [f"{known},{name}" if known else name for name in names if name.startswith(last)]


RAY = option("Work on a Ray cluster: its address, like auto or 10.0.0.1:6379; local starts one here.", panel="Ray")
REPLICAS = option("Models on it. [default: one on each GPU, or on each machine]", min=1, panel="Ray")


def check_replicas(ray: str | None, replicas: int | None) -> None:
    if replicas is not None and ray is None:
        raise OctavoError("--replicas are on a Ray cluster: name it with --ray, or start one here with --ray local")
    if ray is not None:
        from octavo.ray.cluster import require

        require("--ray")


@contextmanager
def on_ray(address: str | None, replicas: int | None, device: str) -> Iterator[Placement | None]:
    """The cluster that --ray names, and where models go on it; None without one."""
    if address is None:
        yield None
        return
    from octavo.ray.cluster import cluster, placement

    with cluster(address):
        yield placement(replicas, device)


def budget_option(counts: str = "") -> Any:
    """--budget of a verb that measures; `counts` are the options that leave it nothing to choose."""
    told = "Time for the work, like 90s, 2m or 1h30m: as much is measured as fits; none: as much as is of use."
    return typer.Option("--budget", help=f"{told} {counts} override it." if counts else told)


def numbers(text: str, name: str) -> list[int]:
    """'1,8' → [1, 8]; raises OctavoError for anything but whole numbers of at least 1."""
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise OctavoError(f"{name} takes whole numbers with commas between, like 1,8; not {text!r}")
    return found


@dataclass
class LoadOptions:
    """How the model is loaded."""

    model: Annotated[
        str | None,
        typer.Argument(help="A directory, Hub id or .gguf file. [default: the bundled model]", show_default=False),
    ] = None
    model_format: Annotated[str, option("How the weights are stored: hf, awq.")] = "hf"
    dtype: Annotated[str, option("auto, bf16, fp16 or fp32.")] = "auto"
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, …")] = "auto"
    device_map: Annotated[str | None, option("auto: spread the model over GPUs, memory and disk.")] = None
    load_format: Annotated[str, option("auto, or dummy for random weights of the config's shape.")] = "auto"
    chat_template: Annotated[Path | None, option("A Jinja file in place of the model's template.")] = None
    session_len: Annotated[int | None, option("Longest session in tokens. [default: the model's]", min=2)] = None
    deterministic: Annotated[
        bool, option("On a CPU: the same bits whatever is computed together.", "--deterministic")
    ] = False

    def check(self) -> None:
        """Raise OctavoError for what names no model, file or choice: without torch, before a weight is read."""
        check_model(self.model)
        check_choice("--dtype", self.dtype, ("auto", *RAW_NAMES.values(), *RAW_NAMES))
        check_choice("--load-format", self.load_format, ("auto", "dummy"))
        if self.chat_template is not None:
            check_file("--chat-template", self.chat_template)

    @property
    def ranks(self) -> int:
        """Processes that the model is divided among."""
        return 1

    def loading(self) -> dict[str, Any]:
        """The same as arguments of Model.load, for processes elsewhere: plain values, and paths that are absolute."""
        here = self.model is not None and Path(self.model).exists()
        return {
            "model": str(Path(str(self.model)).resolve()) if here else self.model,
            "dtype": self.dtype,
            "device": self.device,
            "device_map": self.device_map,
            "load_format": self.load_format,
            "model_format": self.model_format,
            "chat_template": self.chat_template and str(self.chat_template.resolve()),
            "context": self.session_len,
            "deterministic": self.deterministic,
        }

    def load(self, computing: torch.dtype | None = None, say: bool = True, told: bool = False) -> Model:
        """`computing` as in Model.load. Says at once what is loaded, unless that was `told`, and then of a CPU what
        computes, and in what."""
        if not told:
            tell_loading(self.model)
        from octavo import cores
        from octavo.parallel import load

        cores.use()
        loading = self.loading() | {"chat_template": self.chat_template, "computing": computing}
        del loading["model"]  # its name stays as it was given
        model = load(self.model, self.ranks, **loading)
        if say and model.processor is not None:
            print(f"CPU: {model.processor}", file=sys.stderr, flush=True)
        return model


@dataclass
class ShapeOptions:
    """A model whose sizes are asked for: its config is enough."""

    model: Annotated[
        str | None,
        typer.Argument(help="A directory, Hub id or .gguf file. [default: the bundled model]", show_default=False),
    ] = None
    config: Annotated[Path | None, option("A config.json in place of MODEL; no weights are needed.")] = None
    model_format: Annotated[str, option("How the weights are stored: hf, awq.")] = "hf"
    dtype: Annotated[str, option("auto, bf16, fp16 or fp32.")] = "auto"

    def check(self) -> None:
        """Raise OctavoError for what names no model or no type, before torch is imported."""
        check_choice("--dtype", self.dtype, ("auto", *RAW_NAMES.values(), *RAW_NAMES))
        if self.config is None:
            check_model(self.model)
        elif self.model is not None:
            raise OctavoError(f"MODEL {self.model} and --config {self.config} exclude each other")
        elif not self.config.is_file():
            raise OctavoError(f"--config {self.config}: there is no such file; name a model's config.json")

    def locate(self) -> tuple[str, Path]:
        """Name and path of what describes the model: a directory, or the config alone."""
        from octavo.models.locate import locate

        if self.config is None:
            return locate(self.model)
        return self.config.stem if self.config.stem != "config" else self.config.resolve().parent.name, self.config


@dataclass
class ServeOptions(LoadOptions):
    """How it is served."""

    kv: Annotated[
        str | None,
        option(
            "KV cache format: kv8, k8v4, kv4, tuned, int8, … [default: the model's 16 bits]", autocompletion=complete
        ),
    ] = None
    quant_policy: Annotated[int | None, option("0: 16 bits, 4 or 8: int8, as on LMDeploy's page.")] = None
    calibration: Annotated[
        Path | None,
        option("File or directory of the calibration. [default: beside the model]", "--calibration", "--work-dir"),
    ] = None
    granularity: Annotated[str | None, option("tensor, head or channel, in place of the calibration's.")] = None
    headroom: Annotated[float | None, option("Range served over range seen, in place of the calibration's.")] = None
    max_batch_size: Annotated[int, option("Sequences that run at a time.", min=1)] = 16
    cache_max_entry_count: Annotated[
        float | None, option("Share of the free memory the KV cache may take. [default: 0.5 on a CPU, 0.8 on a GPU]")
    ] = None
    kv_cache_memory: Annotated[str | None, option("Size of the KV cache, like 4GiB; of each rank's.")] = None
    snapshot_memory: Annotated[
        str | None, option("Of it, for snapshots of a hybrid's states. [default: two for each session]")
    ] = None
    tensor_parallel_size: Annotated[int, option("Ranks to divide the model among, a GPU for each.", min=1)] = 1

    @property
    def ranks(self) -> int:
        return self.tensor_parallel_size

    def check(self) -> None:
        super().check()
        if (name := self.format_name()) is not None:
            check_name(name)
        check_calibration(self.calibration, self.granularity, self.headroom)

    def llm(self, told: bool = False) -> LLM:
        """Says at once what is loaded, unless that was `told`."""
        if not told:
            tell_loading(self.model)
        from octavo.cli.progress import calibration_with_bar
        from octavo.llm import LLM

        model, name = self.load(told=True), self.format_name()
        format = model.format(name, self.calibration)
        return LLM(
            model,
            format,
            calibration=calibration_with_bar(model, self.calibration, format),
            granularity=self.granularity,  # type: ignore[arg-type]  # checked by LLM
            headroom=self.headroom,
            session_len=self.session_len,
            max_batch_size=self.max_batch_size,
            kv_cache_memory=self.kv_cache_memory,
            cache_max_entry_count=self.cache_max_entry_count,
            snapshot_memory=self.snapshot_memory,
        )

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of LLM, for processes elsewhere."""
        given = self.loading()
        given["session_len"] = given.pop("context")
        given |= {"kv": self.format_name(), "calibration": self.calibration and str(self.calibration.resolve())}
        names = ("granularity", "headroom", "max_batch_size", "kv_cache_memory", "cache_max_entry_count")
        given |= {name: getattr(self, name) for name in (*names, "snapshot_memory", "tensor_parallel_size")}
        return {name: value for name, value in given.items() if value is not None}

    def format_name(self) -> str | None:
        """The format that --kv or --quant-policy names."""
        if self.quant_policy is None:
            return self.kv
        if self.quant_policy not in QUANT_POLICY:
            raise OctavoError(f"--quant-policy is 0 (16 bits), 4 or 8 (both int8), not {self.quant_policy}")
        policy = QUANT_POLICY[self.quant_policy]
        if self.kv is not None and self.kv != policy and (policy or self.kv not in RAW_NAMES.values()):
            raise OctavoError(f"--kv {self.kv} and --quant-policy {self.quant_policy} contradict each other; give one")
        return policy or self.kv


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
