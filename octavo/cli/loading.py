"""What the command line says of a model: how it is loaded and served, or where its sizes are; and what that becomes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.options import (
    CalibrationPath,
    ChatTemplate,
    DeviceName,
    Dtype,
    LoadFormat,
    ModelFormat,
    ModelName,
    OtherGranularity,
    OtherHeadroom,
    amount,
    check_calibration,
    check_file,
    check_model,
    complete,
    of_model,
    option,
    tell_loading,
)
from octavo.errors import OctavoError
from octavo.quant.format import RAW_NAMES, check_name

if TYPE_CHECKING:
    import torch

    from octavo.llm import LLM
    from octavo.models.geometry import Geometry
    from octavo.models.model import Model

# `--quant-policy` of LMDeploy's page, where 4 meant int8; 8 is what LMDeploy calls int8 today.
QUANT_POLICY = {0: None, 4: "int8", 8: "int8"}


@dataclass
class LoadOptions:
    """How the model is loaded."""

    model: ModelName = None
    model_format: ModelFormat = "hf"
    dtype: Dtype = "auto"
    device: DeviceName = "auto"
    device_map: Annotated[str | None, of_model("auto: spread the model over GPUs, memory and disk.")] = None
    load_format: LoadFormat = "auto"
    chat_template: ChatTemplate = None
    session_len: Annotated[int | None, of_model("Longest session in tokens. [default: the model's]", min=2)] = None
    deterministic: Annotated[
        bool, of_model("On a CPU: the same bits whatever is computed together.", "--deterministic")
    ] = False

    def check(self) -> None:
        """Raise OctavoError for what names no model or file: without torch, before a weight is read."""
        check_model(self.model)
        if self.chat_template is not None:
            check_file("--chat-template", self.chat_template)

    @property
    def ranks(self) -> int:
        """Processes that the model is divided among."""
        return 1

    def next(self, kv: str, calibration: Path | None) -> str:
        """The command to type once the model was prepared for a format; `calibration` is where, if that was said."""
        words = ["octavo", "chat", *([self.model] if self.model else []), "--kv", kv]
        words += ["--model-format", self.model_format] if self.model_format != "hf" else []
        words += ["--calibration", str(calibration)] if calibration is not None else []
        return f"next: {shlex.join(words)}"

    def loading(self) -> dict[str, Any]:
        """The same as arguments of Model.load, for processes elsewhere: plain values, and paths that are absolute."""
        here = self.model is not None and Path(self.model).exists()
        names = ("dtype", "device", "device_map", "load_format", "model_format", "deterministic")
        return {
            "model": str(Path(str(self.model)).resolve()) if here else self.model,
            "chat_template": self.chat_template and str(self.chat_template.resolve()),
            "context": self.session_len,
            **{name: getattr(self, name) for name in names},
        }

    def load(
        self, computing: torch.dtype | None = None, say: bool = True, told: bool = False, pairs: bool = True
    ) -> Model:
        """`computing` and `pairs` as in Model.load. Says at once what is loaded, unless that was `told`, and then of a
        CPU what computes, and in what."""
        if not told:
            tell_loading(self.model)
        from octavo import cores
        from octavo.parallel import load

        cores.use()
        loading = self.loading() | {"chat_template": self.chat_template, "computing": computing, "pairs": pairs}
        del loading["model"]  # its name stays as it was given
        model = load(self.model, self.ranks, **loading)
        if say and model.processor is not None:
            print(f"CPU: {model.processor}", file=sys.stderr, flush=True)
        return model


CONTEXT = 2048  # tokens of sessions whose sizes are asked for


@dataclass
class ShapeOptions:
    """A model whose sizes are asked for: its config is enough."""

    model: ModelName = None
    config: Annotated[Path | None, of_model("A config.json in place of MODEL; no weights are needed.")] = None
    model_format: ModelFormat = "hf"
    dtype: Dtype = "auto"
    context: Annotated[
        int | None, option(f"Tokens of every session. [default: {CONTEXT}, or the model's context]", min=2)
    ] = None

    def check(self) -> None:
        """Raise OctavoError for what names no model, before torch is imported."""
        if self.config is None:
            check_model(self.model)
        elif self.model is not None:
            raise OctavoError(f"MODEL {self.model} and --config {self.config} exclude each other")
        elif not self.config.is_file():
            raise OctavoError(f"--config {self.config}: there is no such file; name a model's config.json")

    def tell(self) -> None:
        """The first line of a command that computes sizes, while torch is still imported."""
        print(f"reading the sizes of {self.config or self.model or 'pamphlet'}", file=sys.stderr, flush=True)

    def locate(self) -> tuple[str, Path]:
        """Name and path of what describes the model: a directory, or the config alone."""
        from octavo.models.locate import locate

        if self.config is None:
            return locate(self.model)
        return self.config.stem if self.config.stem != "config" else self.config.resolve().parent.name, self.config

    def trace(self, path: Path) -> tuple[Geometry, int]:
        """The model's sizes, and the tokens of every session."""
        from octavo.models.geometry import Geometry

        geometry = Geometry.trace(path, self.dtype, self.model_format)
        return geometry, min(CONTEXT, geometry.max_context) if self.context is None else self.context


@dataclass
class ServeOptions(LoadOptions):
    """How it is served."""

    kv: Annotated[
        str | None,
        of_model(
            "KV cache format: kv8, k8v4, kv4, tuned, int8, … [default: the model's 16 bits]", autocompletion=complete
        ),
    ] = None
    quant_policy: Annotated[
        int | None, of_model("LMDeploy's numbers in place of --kv: 0 is 16 bits, 4 and 8 are int8.")
    ] = None
    calibration: CalibrationPath = None
    granularity: OtherGranularity = None
    headroom: OtherHeadroom = None
    max_batch_size: Annotated[int, of_model("Sequences that run at a time.", min=1)] = 16
    cache_max_entry_count: Annotated[
        float | None,
        of_model("Share of the free memory the KV cache may take. [default: 0.5 on a CPU, 0.8 on a GPU]", min=0, max=1),
    ] = None
    kv_cache_memory: Annotated[
        str | None, of_model("Size of the KV cache, like 4GiB; with several ranks, of each one's.", callback=amount)
    ] = None
    snapshot_memory: Annotated[
        str | None,
        of_model(
            "Part of that for snapshots of a hybrid model's states. [default: two for each session]", callback=amount
        ),
    ] = None
    tensor_parallel_size: Annotated[
        int, of_model("Processes (ranks) that the model is divided among, a GPU for each.", min=1)
    ] = 1

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
        calibration = calibration_with_bar(model, self.calibration, format)
        return LLM(model, format, calibration=calibration, session_len=self.session_len, **self._serving())

    def _serving(self) -> dict[str, Any]:
        """Arguments of LLM that bear the same names."""
        names = ("granularity", "headroom", "max_batch_size", "kv_cache_memory", "cache_max_entry_count")
        return {name: getattr(self, name) for name in (*names, "snapshot_memory")}

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of LLM, for processes elsewhere."""
        given = self.loading()
        given["session_len"] = given.pop("context")
        given |= {"kv": self.format_name(), "calibration": self.calibration and str(self.calibration.resolve())}
        given |= self._serving() | {"tensor_parallel_size": self.tensor_parallel_size}
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
