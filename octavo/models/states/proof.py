"""Every mixer shows that it computes packed steps exactly, before its model is served.

Two sequences are read by transformers' own forward, each alone and whole; then both in one step, token by token, and in
chunks between which one token stands alone. What differs by more than rounding is refused. The rows are those that the
mixer was given in a run of its model, some of them enlarged, so that gates and time steps come to the ends of their
ranges.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from octavo.cache.states import StatePlan, StatePool
from octavo.errors import Unsupported
from octavo.models.changes import close
from octavo.models.states.find import Found
from octavo.models.states.mixers import StateStep, own_class, own_forward, stepping
from octavo.models.states.native import native_forward

logger = logging.getLogger("octavo")
LENGTHS = (7, 5)  # tokens of the two sequences
TOKENS = sum(LENGTHS)
TOGETHER = (LENGTHS,)
ALONE = ((1, 1),) * 5 + ((1, 0),) * 2  # steps of one token
CHUNKS = ((3, 1), (1, 3), (3, 1))
LARGE = 16.0
SAME = {torch.float32: 1e-4, torch.float16: 2e-2}  # relative, of all rows; other types 5e-2


@torch.inference_mode()
def prove(name: str, found: Sequence[Found]) -> None:
    """Raises Unsupported for a mixer that mixes the sequences of a step, or forgets. One whose calls of several tokens
    forget what was before, and whose calls of one do not, is told to compute such chunks token by token."""
    for each in found:
        mixer, kind = each.mixer, f"{type(each.module).__name__}, layer {each.mixer.layer} of {name},"
        larger = torch.where(torch.arange(TOKENS, device=each.rows.device)[:, None] % 3 == 1, LARGE, 1)
        each.rows = larger.to(each.rows.dtype) * each.rows
        rows = each.rows.split(LENGTHS, 1)
        alone = [own_forward(each.module)(**{mixer.rows: own, mixer.cache: None}, **each.beside) for own in rows]
        if not all(isinstance(own, Tensor) for own in alone):
            raise Unsupported(f"{kind} returns more than its rows")
        mixer.by_token, mixer.native = False, _native(each)
        if mixer.native is not None:
            kept, mixer.states = mixer.states, tuple(replace(s, dtype=torch.float32) for s in mixer.states)
            if _agrees(each, alone):
                continue
            mixer.native, mixer.states = None, kept
        if not _same(_read(each, TOGETHER), alone):
            raise Unsupported(f"{kind} mixes the sequences of a packed step")
        if not _same(_read(each, ALONE), alone):
            raise Unsupported(f"{kind} computes something else token by token than from all tokens at once")
        if not _same(_read(each, CHUNKS), alone):
            mixer.by_token = True
            if not _same(_read(each, CHUNKS), alone):
                raise Unsupported(f"{kind} computes something else in chunks than from all tokens at once")


def _native(each: Found) -> Callable[..., Tensor] | None:
    return native_forward(own_class(each.module), each.rows.device)  # type: ignore[arg-type]


def _agrees(each: Found, alone: Sequence[Tensor]) -> bool:
    """Whether the native kernels give the same: what a mixer does otherwise is its own."""
    try:
        return all(_same(_read(each, cuts), alone) for cuts in (TOGETHER, ALONE, CHUNKS))
    except Exception:  # whatever a mixer gives functions that it takes for transformers'
        logger.debug("%s is computed by its own code", type(each.module).__name__, exc_info=True)
        return False


def _same(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    limit = SAME.get(wanted[0].dtype, 5e-2)
    return all(close(a, b, limit) for a, b in zip(got, wanted, strict=True))


def _read(each: Found, cuts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows that a mixer gives of each sequence, [1, T, width], step by step."""
    texts = [own[0] for own in each.rows.split(LENGTHS, 1)]
    pool = StatePool(StatePlan(((),) * each.mixer.index + (each.mixer.states,)), len(texts))
    out: list[list[Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    for cut in cuts:
        live = [i for i, n in enumerate(cut) if n]
        now = StateStep(pool, torch.tensor(live), [cut[i] for i in live], [done[i] == 0 for i in live])
        packed = torch.cat([texts[i][done[i] : done[i] + cut[i]] for i in live])
        with stepping(now):
            got = each.module(**{each.mixer.rows: packed[None]}, **each.beside)[0]
        for i, rows in zip(live, got.split(now.q_lens), strict=True):
            out[i].append(rows)
            done[i] += cut[i]
    return [torch.cat(rows)[None] for rows in out]
