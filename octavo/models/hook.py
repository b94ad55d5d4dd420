"""What every forward of a bound model goes through: the attention function that transformers calls in place of its own.

It finds, on the module that calls it, which layer that is, and hands q, k and v to whatever `attend` the forward was
given. A forward's `attend` belongs to the thread that runs it, so several threads may run forwards over one model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.contexts import during

NAME = "octavo"
OF_ALL_MODULES = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
"""torch's own: the forward hooks that it calls for whatever module."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, k_dim], k [T, kv_heads, k_dim], v [T, kv_heads, v_dim]) → [T, heads, v_dim]"""


class Recorder(Protocol):
    """What looks at every call of attention in place of answering it."""

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> None: ...


# Of the forward that this thread runs: what it attends to, None between forwards; and the rows whose logits are wanted,
# None if all may be. A forward of transformers' own attends to a CodedCache (octavo/attachment), or to nothing of ours.
attended: ContextVar[Any] = ContextVar("attended", default=None)
due: ContextVar[Tensor | None] = ContextVar("due", default=None)


@contextmanager
def attending(attend: Attend | Recorder, rows: Tensor | None = None) -> Iterator[None]:
    """Around a forward."""
    assert attended.get() is None, "a forward cannot start within another forward of the same thread"
    with during(attended, attend), during(due, rows):
        yield


def attention_modules(hf: nn.Module) -> dict[int, nn.Module]:
    """The modules of a bound model that call attention, by layer."""
    return {vars(module)[NAME]: module for module in hf.modules() if NAME in vars(module)}


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered function: q [1, heads, T, dim], k and v [1, kv_heads, T, dim] after RoPE, before a GQA repeat."""
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    attend = attended.get()
    if attend is None:
        raise RuntimeError("a bound model runs through BoundModel.forward")
    if not callable(attend):
        attend.record(module, q, k, v, attention_mask, kwargs)
        return itself(0, q, k, v)[None], None
    layer: int | None = 0 if attend is itself else getattr(module, NAME, None)
    if layer is None:
        raise RuntimeError(f"{type(module).__name__} was not reached when its model was bound")
    return attend(layer, q, k, v)[None], None


def itself(_: int, q: Tensor, __: Tensor, v: Tensor) -> Tensor:
    """Every row sees itself alone, in whatever layer: none has a number yet."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def blended(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `itself`, each head changed by some, as the directions of the row's q and k say: a forward in which they
    are wrong then answers something else. In float32: rounding of q and k that other rounding then follows adds up."""
    along = torch.linspace(-0.25, 0.25, q.shape[-1], device=q.device)
    by_q, by_k = (1 + F.normalize(x.float(), dim=-1) @ along for x in (q, k))
    group = q.shape[1] // k.shape[1]
    return ((by_k[..., None] * v).repeat_interleave(group, 1) * by_q[..., None]).to(v.dtype)
