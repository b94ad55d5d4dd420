"""A model's weights in the order in which the processor multiplies them, and the type that it computes in.

torch's products of few rows, and of 16-bit numbers on most processors, are slow. So weights of any type go into panels
(weights/panels.py): they stay in 16 bits, sums are float32, and unless a type was asked for so are activations, norms
and residuals, which are small; what comes between products is then fused (fused.py, joined.py, whole_layers.py). Each
weight is rearranged once, when the model is loaded, and no second copy of it is kept. A tied embedding reads its rows
out of the head's panels. The last layer then computes only what is due (due.py).

A rearranged weight has no rows that a model's own code could read, as some routers' does. So only layers that a trial
run calls are rearranged, and if the model then fails or computes something else, all is put back. What is left slower
by that, or because it is of a form that the kernels do not know, is logged, and `octavo doctor` says it too.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cache.states import StatePool
from octavo.errors import Unsupported, one_line
from octavo.models import states
from octavo.models.bind import UNLIMITED, BoundModel, prove_states
from octavo.models.changes import Undo, become, close, put, watched
from octavo.models.due import shorten
from octavo.models.fused import fuse
from octavo.models.hook import Attend, blended, itself
from octavo.models.joined import join
from octavo.models.packed import packed_layers, weight_bytes
from octavo.models.states import StateStep
from octavo.models.whole_layers import apart_of, take_over
from octavo.quant.format import dtype_name
from octavo.weights import cpu
from octavo.weights.activations import ExactActivation, native_function
from octavo.weights.linear import PackedLinear
from octavo.weights.panels import PanelEmbedding, PanelLinear, TypedEmbedding, unpacked

logger = logging.getLogger("octavo")
OWN_ORDER = "multiplies weights in their own order, which is slower"
TRIAL = 16  # sessions of one token
COMPANY = 45
GOLDEN = (math.sqrt(5) - 1) / 2  # the fractions of its multiples fill [0, 1) evenly, however many there are
CUTS = (1,) * COMPANY, (1, TRIAL, COMPANY - TRIAL - 1)  # of a text of as many tokens
SAME = 0.05  # relative: sums in another order round otherwise, and what is wrong is far off
CLOSE = 0.25  # the same where each number is rounded otherwise: bf16 costs deep models a tenth
SMALL = 0.1  # of a model's bytes: more than that is not doubled to compute in float32


def prepack(
    bound: BoundModel, computing: torch.dtype | None = None, deterministic: bool = False, pairs: bool = True
) -> None:
    """Rearrange the weights of a model on a CPU in place, one at a time, choose what it computes in, and then have its
    layers that keep states show that they compute packed steps exactly.

    `computing` is the type of its activations; None: float32, but for models with much beside their linear layers.
    `deterministic` takes float32 products on every processor, for bits that do not depend on what is computed together;
    it raises OctavoError where it cannot. Without `pairs` products are float32 too, for measurements that rounding to
    bf16 would hide.
    """
    _rearrange(bound, computing, deterministic, pairs)
    prove_states(bound)
    if own := sum(mixer.native is None for mixer in bound.mixers if cpu.refuses(bound.device) is None):
        what = f"computes {own} of {len(bound.mixers)} recurrent layers by its own code, which is slower"
        note(bound, what, "the native kernels do not know their functions, or do not agree with them", logging.INFO)
    if deterministic and not _exact(bound):
        name = bound.hf.config.model_type
        raise Unsupported(
            f"{name} has products beside those of its linear layers, or functions whose bits depend on a number's "
            "place: leave --deterministic out"
        )


def _rearrange(bound: BoundModel, computing: torch.dtype | None, deterministic: bool, pairs: bool) -> None:
    if why := cpu.refuses(bound.device):
        if deterministic:
            raise Unsupported(f"deterministic sums need a CPU and the native kernels: {why}")
        return
    _compute_in_panels(bound, computing, deterministic, pairs and not deterministic and cpu.multiplies_pairs())
    every = "computes all rows in its last layer, which is slower"
    attempt(bound, every, lambda _: shorten(bound), SAME, due=slice(3, None, 5))


def _compute_in_panels(bound: BoundModel, computing: torch.dtype | None, deterministic: bool, pairs: bool) -> None:
    if deterministic:
        bound.layers = [replace(layer, exact=True) for layer in bound.layers]
        for packed in packed_layers(bound.hf).values():
            packed.exact = True
    name = bound.hf.config.model_type
    if not attempt(bound, OWN_ORDER, lambda called: into_panels(bound.hf, called, pairs), SAME):
        if deterministic:
            raise Unsupported(f"{name} reads weights beside calling their layers: leave --deterministic out")
        return
    own = "keeps torch's activations, whose last bits may depend on what is computed together"
    attempt(bound, own, lambda _: _exact_activations(bound.hf), SAME)
    if computing is None:
        doubled = sum(parameter.nbytes for parameter in _beside_layers(bound.hf))
        computing = torch.float32 if doubled <= SMALL * weight_bytes(bound.hf) else bound.dtype
    own = f"computes in {dtype_name(bound.dtype)}, which is slower"
    if computing != bound.dtype and attempt(bound, own, lambda _: retype(bound.hf, computing), CLOSE):
        bound.computes = computing
    if bound.computes == torch.float32:
        attempt(bound, "runs without fused modules, which is slower", lambda _: fuse(bound.hf), SAME)
        apart = "multiplies layers of the same rows one by one, which is slower"
        attempt(bound, apart, lambda _: join(bound.hf, lambda: _trial(bound)), SAME)
        whole = "computes its layers module by module, which is slower"
        if attempt(bound, whole, lambda _: take_over(bound, lambda attend: _trial(bound, attend=attend)), SAME) and (
            left := apart_of(bound)
        ):
            note(bound, left, "they are not of the form that the native calls know", logging.INFO)


def is_prepacked(model: nn.Module) -> bool:
    return any(isinstance(module, PanelLinear) for module in model.modules())


def rounds_rows(model: nn.Module) -> bool:
    """Whether rows are rounded to bf16 for some of its products."""
    return any(isinstance(module, PanelLinear) and cpu.in_pairs(module.weight) for module in model.modules())


def attempt(
    bound: BoundModel,
    otherwise: str,
    rearrange: Callable[[set[nn.Module]], Iterator[Undo]],
    tolerance: float,
    due: slice = slice(None),
) -> bool:
    """Rearrange a model, given the linear layers that a trial run calls. If that fails, or the model then fails or
    computes something else for the rows of the trial that are due, all is put back, and what the model does `otherwise`
    is noted."""
    called: set[nn.Module] = set()
    linear = [module for module in bound.hf.modules() if type(module) is nn.Linear]
    with watched(module.register_forward_hook(lambda module, *_: called.add(module)) for module in linear):
        before = _trial(bound, due=due)
    undo: list[Undo] = []
    why = "rearranged, it computed something else"
    try:
        for back in rearrange(called):
            undo.append(back)
        if close(_trial(bound, due=due), before, tolerance):
            return True
    except Exception as error:  # whatever a model does with rows that are not there
        logger.debug("a model is left as it was where a trial failed", exc_info=True)
        why = f"rearranged, it failed with {type(error).__name__}: {one_line(error)}"
    for back in reversed(undo):
        back()
    note(bound, otherwise, why)
    return False


def note(bound: BoundModel, otherwise: str, why: str, level: int = logging.WARNING) -> None:
    """What a model does slower than this processor could."""
    bound.slower.append(f"{otherwise}: {why}")
    logger.log(level, "%s %s: %s", bound.hf.config.model_type, otherwise, why)


def _exact(bound: BoundModel) -> bool:
    """Whether no product is torch's own, and logits of lone tokens have the same bits among others as alone; of a model
    with states, those of a text in whatever steps."""
    mixers = states.native_mixers(bound.hf)
    convolutions = {id(parameter) for mixer in mixers for parameter in mixer.parameters()}
    if any(parameter.dim() > 1 and id(parameter) not in convolutions for parameter in _beside_layers(bound.hf)):
        return False
    if len(mixers) < len(bound.mixers):
        return False
    one, *more = (
        _trial(bound, count, bound.new_step([1] * count), attend=itself) for count in (COMPANY, 1, 2, TRIAL + 1)
    )
    if not all(torch.equal(few, one[: len(few)]) for few in more):
        return False
    return not mixers or all(torch.equal(_text(bound, cuts), _text(bound, [COMPANY])) for cuts in CUTS)


def _trial(
    bound: BoundModel,
    count: int = TRIAL,
    step: StateStep | None = None,
    due: slice = slice(None),
    attend: Attend = blended,
) -> Tensor:
    """Logits [count, vocabulary] of as many sessions of one token, or of those that are due; without a `step`, of one
    session to layers that keep states. Their positions are all over the model's context, the first of them 0: RoPE, and
    what else follows the position, shows."""
    ids, rows = torch.tensor(bound.random_tokens(count)), torch.arange(count)
    context = bound.max_context if bound.max_context < UNLIMITED else COMPANY
    positions = (rows * GOLDEN % 1 * context).long()
    return bound.forward(ids, positions, rows[due], attend, step).float()


def _text(bound: BoundModel, cuts: Sequence[int]) -> Tensor:
    """Logits [tokens, vocabulary] of a text computed in steps of so many tokens, each of which attends to itself."""
    ids, whole = torch.tensor(bound.random_tokens(sum(cuts))), torch.arange(sum(cuts))
    pool, slot = StatePool(bound.states, 1), torch.tensor([0])
    found: list[Tensor] = []
    for own, positions in zip(ids.split(list(cuts)), whole.split(list(cuts)), strict=True):
        step = StateStep(pool, slot, [len(own)], [not found])
        found.append(bound.forward(own, positions, torch.arange(len(own)), itself, step))
    return torch.cat(found)


def into_panels(model: nn.Module, called: set[nn.Module], pairs: bool = False) -> Iterator[Undo]:
    """Weights of linear layers in panels, those of bf16 with `pairs` as such, and embeddings that share them."""
    for modules in _by_weight(model):
        linear = [module for module in modules if not isinstance(module, nn.Embedding)]
        if linear and called.issuperset(linear) and linear[0].weight.dtype in cpu.FLOATS:
            kinds = [PanelLinear if module in called else PanelEmbedding for module in modules]
            weight = linear[0].weight.detach()
            new = cpu.pack_panels(weight, pairs and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0)
            yield replace_weights(modules, new, kinds, partial(unpacked, out=linear[0].out_features))


def _exact_activations(model: nn.Module) -> Iterator[Undo]:
    """Activations of which no number's bits depend on its place."""
    for module in model.modules():
        if function := native_function(module):
            yield become(module, ExactActivation, function=function)


def retype(model: nn.Module, computing: torch.dtype) -> Iterator[Undo]:
    """Have a model compute in another type than its weights have. Those in panels, in 4 bits and of embeddings stay
    what they are; all others are converted."""
    for module in list(model.modules()):
        kept = {"weight"} if isinstance(module, PanelLinear | nn.Embedding) else set()
        if isinstance(module, PanelEmbedding):
            yield put(module, "leaves_as", computing)
        elif isinstance(module, nn.Embedding):
            yield replace_weights([module], module.weight, [TypedEmbedding], lambda weight: weight)
            module.leaves_as = computing  # type: ignore[assignment]
        own: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False)]
        if not isinstance(module, PackedLinear):
            own += module.named_buffers(recurse=False)
        for name, tensor in own:
            if name not in kept and tensor.dtype in (torch.bfloat16, torch.float16):
                yield put(tensor, "data", tensor.data.to(computing))


def _by_weight(model: nn.Module) -> Iterator[list[Any]]:
    """The linear layers and embeddings of each weight that nothing else has. No weight is kept from one to the next."""
    users: dict[int, list[Any]] = {}
    for module in model.modules():
        for identity in map(id, module.parameters(recurse=False)):
            users.setdefault(identity, []).append(module)
    for modules in users.values():
        if all(
            isinstance(module, nn.Embedding) or (type(module) is nn.Linear and module.weight is modules[0].weight)
            for module in modules
        ):
            yield modules


def _beside_layers(model: nn.Module) -> Iterator[Tensor]:
    """The parameters that are neither a linear layer's nor an embedding's."""
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            yield from module.parameters(recurse=False)


def replace_weights(
    modules: Sequence[Any], weight: Tensor, kinds: Sequence[type[nn.Module]], back: Callable[[Tensor], Tensor]
) -> Undo:
    """Give modules that share a weight another one, and each a kind: a subclass of its class, or of nn.Embedding, whose
    forward its own calls. The modules themselves change, not their parents' entries: they may have several parents."""
    parameter = nn.Parameter(weight, requires_grad=False)
    classes = [type(module) for module in modules]
    for module, own, kind in zip(modules, classes, kinds, strict=True):
        module.weight = parameter
        both = {"__module__": own.__module__, "__doc__": own.__doc__}
        module.__class__ = kind if issubclass(kind, own) else type(own.__name__, (own, kind), both)

    def undo() -> None:
        old = nn.Parameter(back(modules[0].weight.detach()), requires_grad=False)
        for module, own in zip(modules, classes, strict=True):
            module.weight, module.__class__ = old, own

    return undo
