"""A loaded model with what belongs to it: tokenizer, generation defaults, fingerprint, calibration."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel

from octavo import processor
from octavo.devices import HOST, find_device
from octavo.errors import OctavoError
from octavo.models.bind import BoundModel, bind, prove_states
from octavo.models.files import base_of, config_json
from octavo.models.fingerprint import fingerprint
from octavo.models.generation import eos_token_ids, generation_settings
from octavo.models.load import Division, load_model
from octavo.models.locate import BUNDLED as BUNDLED
from octavo.models.locate import find_artefact, is_directory, locate, work_dir
from octavo.models.magnitude import TOKENS, fit_table
from octavo.models.packed import packed_layers
from octavo.models.prepack import prepack, rounds_rows
from octavo.models.rope import short_context
from octavo.models.tokenizer import load_tokenizer, warn_of_strangers
from octavo.quant import tuned
from octavo.quant.calibration import FILE_NAME, SYNTHETIC, Calibration
from octavo.quant.format import Format, KVFormat, by_layer, dtype_name, is_tuned
from octavo.quant.tuned import Tuned

SENTENCE = (  # any text, by which the size of K and V is seen
    "The old lighthouse keeper wrote down the weather every evening, and in forty years he never missed a day, "
    "although nobody had asked him to."
)


class Loading(TypedDict, total=False):
    """The arguments of `Model.load` that `LLM` takes too."""

    dtype: str
    device: str
    device_map: str | None
    load_format: str
    model_format: str
    chat_template: str | Path | None
    deterministic: bool


def tuned_formats(name: str, path: Path, beside: str | Path | None = None) -> Tuned:
    """What `octavo tune` has chosen for a model: it lies beside the calibration, which may be named."""
    if beside is None:
        file = find_artefact(tuned.FILE_NAME, name, path)
    else:
        file = (Path(beside) if Path(beside).is_dir() else Path(beside).parent) / tuned.FILE_NAME
    if file is None or not file.is_file():
        raise OctavoError(
            f"no formats were tuned for {name}{f' in {file.parent}' if file else ''}: run `octavo tune {name}`"
        )
    return Tuned.load(file)


@dataclass
class Model:
    """Made by `Model.load` or `Model.of`; several LLMs may share one, each with a cache of its own format."""

    bound: BoundModel
    tokenizer: Any
    path: Path
    name: str  # as the user wrote it
    eos_ids: frozenset[int]
    generation: dict[str, Any] = field(default_factory=dict)  # what the model's generation_config.json sets
    synthetic: bool = False  # random weights: `--load-format dummy`

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
        load_format: str = "auto",
        model_format: str = "hf",
        chat_template: str | Path | None = None,
        context: int | None = None,
        plain_weights: bool = False,
        computing: torch.dtype | None = None,
        deterministic: bool = False,
        pairs: bool = True,
        division: Division | None = None,
    ) -> Model:
        """Load and bind a directory, a Hub id, or the bundled model if None.

        `context` is the longest session to be served: some RoPE variants depend on it. Longrope has factors for short
        contexts and others for long ones; without `context` sessions end where the first do. With `plain_weights` they
        stay in the order of the files, to be rewritten. `computing` is the type of activations, by default `dtype` or,
        where that is "auto", what suits the processor. `deterministic` makes the bits of a sum on a CPU independent of
        what is computed together with it. Without `pairs` products are float32 where the processor's own round to bf16.
        With `division` this process holds a share of the model (octavo/parallel).
        """
        name, path = locate(model)
        device = str(find_device(device))
        settings = generation_settings(base_of(path))
        hf = load_model(
            path,
            dtype=dtype,
            device=device,
            device_map=device_map,
            load_format=load_format,
            model_format=model_format,
            division=division,
        )
        tokenizer = load_tokenizer(path, chat_template)
        eos = eos_token_ids(config_json(path), settings, tokenizer)
        if context is None and (context := short_context(hf.config)) is not None:
            warnings.warn(
                f"{name} has RoPE factors for contexts up to {context} tokens and others for longer ones: the first "
                f"are used, and sessions end at {context}. A larger --session-len takes the others, at every length",
                stacklevel=3,
            )
        bound = bind(hf, context, prove=False)
        if division is not None:
            bound = division.join(bound)
        warn_of_strangers(tokenizer, bound.vocab_size, name)
        if computing is None and dtype != "auto":
            computing = bound.dtype
        if deterministic and device_map is not None:
            raise OctavoError("deterministic sums need weights on one device: leave the device map out")
        if device_map is None and not plain_weights:  # accelerate moves weights about, which must stay plain for it
            prepack(bound, computing, deterministic, pairs)
        else:
            prove_states(bound)
        known = [token for token in tokenizer(SENTENCE)["input_ids"] if token < bound.vocab_size]
        fit_table(bound, known or bound.random_tokens(TOKENS))
        return cls(bound, tokenizer, path, name, eos, settings, load_format == "dummy")

    @classmethod
    def of(
        cls, hf: PreTrainedModel, path: Path, context: int | None = None, computing: torch.dtype | None = None
    ) -> Model:
        """`hf`, taken over, as `load` would have it but without a tokenizer: a model for measurements.

        It counts as one of random weights and is named as `path`, which need not be there.
        """
        bound = bind(hf, context, prove=False)
        prepack(bound, computing)
        fit_table(bound, bound.random_tokens(TOKENS))
        return cls(bound, None, path, path.name, frozenset(), synthetic=True)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights; a calibration made for others is refused."""
        return SYNTHETIC if self.synthetic else fingerprint(self.path)

    @property
    def argument(self) -> str:
        """Its name as a shell takes it."""
        return shlex.quote(self.name)

    @property
    def weight_kind(self) -> str:
        """int4, or the model's own type: bf16, fp16 or fp32."""
        return "int4" if packed_layers(self.bound.hf) else str(self.bound.raw_format)

    @property
    def processor(self) -> str | None:
        """The processor, its instructions, and the types of weights and of what is computed; None on other devices."""
        if self.bound.device != HOST:
            return None
        computes = dtype_name(self.bound.computes) + (", products bf16" if rounds_rows(self.bound.hf) else "")
        return f"{processor.name()}, {processor.instructions()}; weights {self.weight_kind}, computing {computes}"

    @property
    def work_dir(self) -> Path:
        """Where artefacts go by default."""
        return work_dir(self.name, self.path)

    @property
    def is_directory(self) -> bool:
        """Whether the user named a directory."""
        return is_directory(self.name, self.path)

    def calibration_file(self) -> Path | None:
        return find_artefact(FILE_NAME, self.name, self.path)

    def format(self, kv: str | Format | None, given: str | Path | Calibration | None = None) -> Format:
        """The format that is named: the model's own if None; for "tuned" what `octavo tune` has chosen, which is looked
        for beside the calibration that is `given`, or where calibrations are found."""
        if kv is None:
            return self.bound.raw_format
        if isinstance(kv, Format):
            return kv
        if not is_tuned(kv):
            return KVFormat.parse(kv)
        beside = None if isinstance(given, Calibration) else given
        found = tuned_formats(self.name, self.path, beside)
        found.check(None if self.synthetic else self.fingerprint, len(self.bound.shapes))
        return found.formats

    def calibration(self, given: str | Path | Calibration | None, format: Format) -> Calibration | None:
        """The calibration to serve `format` with, checked against the weights: `given`, or the file that is found."""
        if not format.takes_calibration or not self.bound.shapes:
            return None
        if isinstance(given, Calibration):
            found = given
        elif given is not None:
            found = Calibration.load(Path(given))
        else:
            file = self.calibration_file()
            if file is None:
                if not format.needs_calibration:
                    return None
                raise OctavoError(
                    f"{format} needs a calibration of {self.name} and none is in {self.work_dir}: run "
                    f"`octavo calibrate {self.argument}`, or use --kv kv8, which needs none"
                )
            found = Calibration.load(file)
        shapes = [(shape.kv_heads, shape.k_dim, shape.v_dim) for shape in self.bound.whole]
        try:
            found.check(self.fingerprint, self.bound.rotary, shapes)
            codecs = [codec for one in by_layer(format, len(shapes)) for codec in (one.k, one.v)]
            if found.ranges_alone and (token := next((codec for codec in codecs if codec.has_token_scale), None)):
                raise OctavoError(found.lacks(token))
        except OctavoError as error:
            if given is not None or format.needs_calibration:
                raise
            warnings.warn(f"{error}; {format} is served without it", stacklevel=3)
            return None
        return found
