"""Which linear layers share an input, and what in front of them can absorb a scale of its channels.

If a module's output x, divided by s channel by channel, reaches nothing but the inputs of some linear layers, and these
multiply what they get by s, then the model computes what it did. So s can be moved into weights: the source's are
divided, the layers' columns multiplied. Sources are norms and linear layers, whose own weights scale their output.

Nothing is looked up by architecture. Candidates are seen in one run of the model: the module that returned the very
tensor that the layers take, else an earlier linear layer beside them as wide as their input, whose output arrives
through other arithmetic (`up` before `down`, `v` before `o`). Each kind of candidate is then tried in a run, with
powers of two, for which division and multiplication are exact. What does not compute the same is no fold: a gelu
between, a router that takes the same input, a residual that adds it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.models.changes import close, watched

SAME = 1e-5  # relative; powers of two leave every bit as it was

Run = Callable[[], Tensor]
"""The model over a few tokens, always the same: its logits."""


@dataclass(frozen=True)
class Fold:
    """Names of the linear layers of one input, in the order they run, and of what precedes them; None where nothing
    can absorb a scale."""

    layers: tuple[str, ...]
    source: str | None = None

    @property
    def kind(self) -> str:
        """The same in every block of the model."""
        return re.sub(r"\d+", "*", " ".join((*self.layers, self.source or "")))


@dataclass
class _Seen:
    """What one run shows. Tensors are kept, since an address is only theirs while they live."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # of linear layers by name, in the order they run
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of possible sources


def find_folds(model: nn.Module, linear: dict[str, nn.Linear], run: Run) -> list[Fold]:
    """The layers of `linear`, by name in `model`, that `run` reaches: grouped by their input, in the order they run."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    sources = {
        name: module
        for name, module in model.named_modules()
        if _width(module) and all(owners[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
    }
    seen = _Seen()
    with watched(
        [linear[name].register_forward_pre_hook(partial(_note_input, seen, name)) for name in linear]
        + [sources[name].register_forward_hook(partial(_note_output, seen, name)) for name in sources]
    ):
        logits = run()
    # A layer that was not reached may take any input of its width: an expert that these tokens did not choose.
    unknown = {linear[name].in_features for name in linear.keys() - seen.inputs.keys()}

    found: dict[tuple[str, ...], Fold] = {}
    kinds: dict[str, list[Fold]] = {}
    for layers in _groups(seen):
        found[layers] = Fold(layers)
        width = linear[layers[0]].in_features
        for source in _candidates(layers, width, sources, seen) if width not in unknown else ():
            fold = Fold(layers, source)
            kinds.setdefault(fold.kind, []).append(fold)
    for folds in kinds.values():
        untried = [fold for fold in folds if found[fold.layers].source is None]
        if untried and _hold(untried, linear, sources, run, logits):
            found |= {fold.layers: fold for fold in untried}
    return list(found.values())


def absorb(source: Any, scale: Tensor) -> None:
    """Divide the output of a fold's source by `scale` [channels], in its weights."""
    weight, bias = source.weight.data, getattr(source, "bias", None)
    if isinstance(source, nn.Linear):
        weight.div_(scale[:, None])
    else:
        shift = _shift(source)
        assert shift is not None, "no fold has such a source"
        weight.copy_((weight + shift) / scale - shift)
    if bias is not None:
        bias.data.div_(scale)


def _shift(norm: Any) -> int | None:
    """What a norm adds to its weight before it multiplies by it: 0, or 1 in Gemma. None for a module that does not
    scale its output so."""
    weight, bias = norm.weight.data, getattr(norm, "bias", None)
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    kept, offset = weight.clone(), 0 if bias is None else bias
    try:
        once = norm(x) - offset
        for shift in (0, 1):
            weight.copy_(2 * (kept + shift) - shift)
            twice = norm(x) - offset
            if close(2 * once, twice, 0.02):  # what rounding the weight leaves
                return shift
    except Exception:  # a module that takes more than x
        return None
    finally:
        weight.copy_(kept)
    return None


def _width(module: nn.Module) -> int | None:
    """Channels of the output that the weights of a possible source scale; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def _note_input(seen: _Seen, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    seen.inputs[name] = args[0]


def _note_output(seen: _Seen, name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    if isinstance(output, Tensor):
        seen.outputs[name] = output


def _groups(seen: _Seen) -> list[tuple[str, ...]]:
    """Names of the layers that take the very same tensor."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, x in seen.inputs.items():
        groups.setdefault(_place(x), []).append(name)
    return [tuple(names) for names in groups.values()]


def _candidates(layers: tuple[str, ...], width: int, sources: dict[str, nn.Module], seen: _Seen) -> list[str]:
    """What may absorb a scale of the layers' input: who returned it, else earlier linear layers beside the first."""
    x = seen.inputs[layers[0]]
    direct = [name for name, output in seen.outputs.items() if _place(output) == _place(x)]
    if direct:
        return [name for name in direct if _width(sources[name]) == width]
    order = list(seen.inputs)
    earlier = order[: order.index(layers[0])]
    beside = [name for name in earlier if name.rpartition(".")[0] == layers[0].rpartition(".")[0]]
    return [name for name in reversed(beside) if name in sources and _width(sources[name]) == width]


def _hold(
    folds: list[Fold], linear: dict[str, nn.Linear], sources: dict[str, nn.Module], run: Run, logits: Tensor
) -> bool:
    """Whether the logits stay the same when the sources' outputs are divided and the layers' inputs multiplied."""
    norms = [module for fold in folds if not isinstance(module := sources[str(fold.source)], nn.Linear)]
    if any(_shift(norm) is None for norm in norms):
        return False
    generator = torch.Generator().manual_seed(0)
    handles = []
    for fold in folds:
        source, width = sources[str(fold.source)], linear[fold.layers[0]].in_features
        scale = 2.0 ** torch.randint(-1, 2, (width,), generator=generator)
        handles.append(source.register_forward_hook(lambda _, __, y, s=scale: y / s.to(y)))
        handles += [
            linear[name].register_forward_pre_hook(lambda _, args, s=scale: (args[0] * s.to(args[0]), *args[1:]))
            for name in fold.layers
        ]
    with watched(handles):
        return close(run(), logits, SAME)


def _place(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()
