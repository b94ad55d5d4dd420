"""Make 4-bit weights: watch what the linear layers take, scale, clip, round and pack them.

One pass over windows of text, through the same attention as serving, keeps of every linear layer's input the mean
magnitude of its channels and a sample of rows. Then each group of layers that share an input is scaled where something
in front of it can absorb the scale (models/scale_folding.py), the model must still compute what it did, and layer
after layer is rounded and replaced by its packed self, so that from there on memory shrinks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.engine.reading import Reading
from octavo.errors import OctavoError, Unsupported
from octavo.models.bind import BoundModel
from octavo.models.changes import watched
from octavo.models.packed import fitting_groups, pack, packable
from octavo.models.prepack import is_prepacked
from octavo.models.scale_folding import Fold, absorb, find_folds
from octavo.progress import Progress, silent
from octavo.weights import GROUP_SIZES, Method, validate
from octavo.weights.awq import TINY, Search, round_to_nearest, search_scale, search_shrink
from octavo.weights.layouts import pack_awq

ROWS = 512  # of each input that are kept, from all windows alike
TRIAL = 32  # tokens on which folds are tried
SEARCHES = (Search(), Search(10, 512), Search(5, 256))  # from the best to the quickest
SAMPLE = 256  # outputs of a layer that the searches are timed on


@dataclass
class Input:
    """One input of linear layers: what they took of it, and how it was scaled."""

    fold: Fold
    mean: Tensor  # of |x|, of each channel
    rows: list[Tensor] = field(default_factory=list)  # some of them
    scale: Tensor | float = 1.0
    alpha: float | None = None  # None where there is nothing to absorb a scale


@dataclass(frozen=True)
class Rounded:
    """How the layers of one input were rounded. Errors are mean squares of the outputs, relative to the outputs'."""

    fold: Fold
    alpha: float | None  # None where there was nothing to absorb a scale
    plain: float  # what rounding to nearest alone would have cost
    error: float


@dataclass(frozen=True)
class Quantized:
    """4-bit weights as an AWQ checkpoint names them, and how they were made."""

    tensors: dict[str, Tensor]
    group_size: int
    groups: list[Rounded]
    weights: int  # parameters that were quantized

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, their scales and zeros included."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / self.weights


def quantize(
    bound: BoundModel,
    windows: Sequence[Sequence[int]],
    *,
    group_size: int = 128,
    method: Method = "awq",
    search: Search | None = None,
    progress: Progress = silent,
) -> Quantized:
    """Quantize the linear layers of `bound` in place, with inputs seen in `windows` of token ids.

    `rtn` rounds to nearest and is there to compare with; it too takes windows, to report its error on them. Raises
    Unsupported for a model without a linear layer that groups divide.
    """
    validate(group_size, method)
    linear = quantizable(bound.hf, group_size)
    run = partial(_trial, bound)
    with torch.inference_mode(False), torch.no_grad():
        before = run()
        inputs = _watch(bound, find_folds(bound.hf, linear, run), linear, windows, progress)
        if method == "awq":
            _scale(bound.hf, linear, inputs, group_size, search or SEARCHES[0], progress)
            _require_same(run(), before, bound.dtype)
        return _round(bound.hf, linear, inputs, group_size, method, progress)


def quantizable(hf: PreTrainedModel, group_size: int) -> dict[str, nn.Linear]:
    """The linear layers that can be packed, by name. Raises Unsupported where there is none."""
    if is_prepacked(hf):
        raise OctavoError(
            "the weights of this model are in the processor's order, in which they are served and cannot be scaled: "
            "load it with Model.load(..., plain_weights=True)"
        )
    if fitting := packable(hf, group_size):
        return fitting
    head = hf.get_output_embeddings()
    sizes = sorted({m.in_features for m in hf.modules() if isinstance(m, nn.Linear) and m is not head})
    if not sizes:
        raise Unsupported("this model has no linear layers but its head: there is nothing to quantize")
    smaller = [str(g) for g in GROUP_SIZES if any(size % g == 0 for size in sizes)]
    remedy = f"choose {' or '.join(smaller)}" if smaller else f"none of {GROUP_SIZES} does"
    raise Unsupported(f"groups of {group_size} divide no layer's inputs ({', '.join(map(str, sizes))}): {remedy}")


def choose_group(hf: PreTrainedModel, asked: int | None) -> int:
    """The group size that packs most weights, or the one `asked` for. Raises Unsupported where that packs fewer, with
    the ones that pack most. Only shapes are looked at: `hf` may be on torch's meta device."""
    best = fitting_groups(hf)
    if asked is None or asked in best:
        return asked or best[-1]
    fits = packable(hf, asked)
    left = sorted({layer.in_features for name, layer in packable(hf, best[0]).items() if name not in fits})
    raise Unsupported(
        f"groups of {asked} do not divide the inputs of every linear layer ({', '.join(map(str, left))}): "
        f"choose {' or '.join(map(str, best))}"
    )


def choose_search(hf: PreTrainedModel, group_size: int, method: Method, seconds: float | None) -> tuple[Search, float]:
    """The best of SEARCHES that takes at most `seconds`, or the quickest, and what it takes with the rounding: by the
    time for a few outputs of one layer."""
    layers = list(quantizable(hf, group_size).values())
    if method == "rtn":
        return SEARCHES[0], 0.0
    weight = layers[0].weight[:SAMPLE].float()
    rows, mean = torch.randn(ROWS, weight.shape[1], device=weight.device), weight.new_ones(weight.shape[1])

    def took(work: Callable[[], object]) -> float:
        work()  # the first is slow
        start = perf_counter()
        work()
        return (perf_counter() - start) / weight.numel()

    with torch.no_grad():
        step = took(lambda: search_scale([weight], rows, mean, group_size, Search(1, SAMPLE)))
        shrink = took(lambda: search_shrink(weight, rows, group_size))
    shapes = [layer.weight.shape for layer in layers]

    def all_layers(search: Search) -> float:
        return sum(
            inputs * (step * search.steps * min(outputs, search.outputs) + shrink * outputs)
            for outputs, inputs in shapes
        )

    fitting = [search for search in SEARCHES if seconds is None or all_layers(search) <= seconds]
    chosen = fitting[0] if fitting else SEARCHES[-1]
    return chosen, all_layers(chosen)


def _scale(
    hf: nn.Module,
    linear: dict[str, nn.Linear],
    inputs: Sequence[Input],
    group_size: int,
    search: Search,
    progress: Progress,
) -> None:
    """Move a scale into the weights of every fold that has where to put one."""
    for done, own in enumerate(inputs):
        progress("searching scales", done, len(inputs))
        if own.fold.source is not None:
            layers = [linear[name] for name in own.fold.layers]
            weights = [layer.weight.float() for layer in layers]
            scale, own.alpha = search_scale(weights, torch.cat(own.rows).float(), own.mean, group_size, search)
            for layer in layers:
                layer.weight.data.mul_(scale)
            absorb(hf.get_submodule(own.fold.source), scale)
            own.scale = scale
    progress("searching scales", len(inputs), len(inputs))


def _trial(bound: BoundModel) -> Tensor:
    """Logits of a few random tokens, the same in every run."""
    return torch.cat(list(Reading(bound).logits(bound.random_tokens(TRIAL))))


def _watch(
    bound: BoundModel,
    folds: Sequence[Fold],
    linear: dict[str, nn.Linear],
    windows: Sequence[Sequence[int]],
    progress: Progress,
) -> list[Input]:
    """One pass over `windows`, from position 0, that sees the input of the first layer of each fold."""
    tokens = sum(map(len, windows))
    generator = torch.Generator().manual_seed(0)
    inputs: list[Input] = []
    handles = []
    for fold in folds:
        layer = linear[fold.layers[0]]
        inputs.append(Input(fold, layer.weight.new_zeros(layer.in_features).float()))
        handles.append(layer.register_forward_pre_hook(partial(_take, inputs[-1], ROWS / tokens, tokens, generator)))
    with watched(handles):
        for done, window in enumerate(windows):
            progress("watching inputs", done, len(windows))
            Reading(bound).run(window)
    progress("watching inputs", len(windows), len(windows))
    for own in inputs:
        if not own.mean.isfinite().all():
            raise OctavoError(
                f"the inputs of {own.fold.layers[0]} are not finite: the model overflows in {bound.dtype}; "
                "load it with --dtype bf16 or fp32, or check its weights"
            )
    return inputs


def _take(
    seen: Input, share: float, tokens: int, generator: torch.Generator, _: nn.Module, args: tuple[Any, ...]
) -> None:
    x = args[0].flatten(0, -2)
    seen.mean = seen.mean + x.float().abs().sum(0) / tokens
    chosen = torch.randperm(len(x), generator=generator)[: max(1, round(share * len(x)))]
    seen.rows.append(x[chosen.to(x.device)].clone())


def _require_same(logits: Tensor, before: Tensor, dtype: torch.dtype) -> None:
    """Scales are exact but for the rounding of the weights that take them."""
    off = ((logits - before).norm() / before.norm()).item()
    if not off <= max(4 * torch.finfo(dtype).eps, 1e-4):
        raise Unsupported(
            f"scaling the weights of this model changed what it computes (logits by {off:.1%}): nothing was written; "
            "--method rtn leaves them unscaled"
        )


def _round(
    hf: nn.Module,
    linear: dict[str, nn.Linear],
    inputs: list[Input],
    group_size: int,
    method: Method,
    progress: Progress,
) -> Quantized:
    """Round every layer, put its packed self in its place, and take it out of `linear`, and what it took out of
    `inputs`, so that none is kept."""
    tensors: dict[str, Tensor] = {}
    groups: list[Rounded] = []
    weights = done = 0
    count = sum(len(own.fold.layers) for own in inputs)
    while inputs:
        own = inputs.pop(0)
        rows = torch.cat(own.rows).float() / own.scale
        plain = error = 0.0
        for name in own.fold.layers:
            progress("rounding", done, count)
            weight = linear.pop(name).weight.float()
            shrink = search_shrink(weight, rows, group_size) if method == "awq" else 1.0
            rounded = round_to_nearest(weight, group_size, shrink)
            unscaled = round_to_nearest(weight / own.scale, group_size).dequantize() * own.scale
            output = (rows @ weight.T).square().mean().clamp(min=TINY)
            plain += ((rows @ (unscaled - weight).T).square().mean() / output).item() / len(own.fold.layers)
            error += ((rows @ (rounded.dequantize() - weight).T).square().mean() / output).item() / len(own.fold.layers)
            tensors |= {f"{name}.{key}": tensor.cpu() for key, tensor in pack_awq(rounded).items()}
            pack(hf, name, rounded)
            weights += weight.numel()
            done += 1
        groups.append(Rounded(own.fold, own.alpha, plain, error))
    progress("rounding", count, count)
    return Quantized(tensors, group_size, groups, weights)
