"""The native recurrences against their formulas in plain torch, and against themselves in other steps: bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.recurrences import cpu
from octavo.recurrences.cpu import Places

pytestmark = pytest.mark.skipif(cpu.extension.unavailable is not None, reason=str(cpu.extension.unavailable))

LENGTHS = (37, 1, 8)  # rows of the sequences: beyond a tile, one, some
SLOTS = (2, 0, 3)
CUTS = ((1, 0, 3), (35, 1, 0), (0, 0, 4), (1, 0, 1))  # the same rows in other steps
Run = Callable[[Places, list[Tensor], Tensor, Tensor], Tensor]  # (places, rows, conv states, states) → rows


def places(lengths: tuple[int, ...], slots: tuple[int, ...]) -> Places:
    return Places(torch.tensor([0, *lengths]).cumsum(0), torch.tensor(slots))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def convolution() -> tuple[list[Tensor], Run, Callable[[list[Tensor]], Tensor]]:
    weight, bias = drawn(70, 4), drawn(70)

    def formula(rows: list[Tensor]) -> Tensor:
        padded = F.pad(rows[0].T[None], (3, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=70))[0].T

    return [drawn(46, 70)], lambda at, rows, conv, _: cpu.convolve(at, rows[0], weight, bias, True, conv), formula


def delta_rule(by_channel: bool) -> tuple[list[Tensor], Run, Callable[[list[Tensor]], Tensor]]:
    q, k, v = drawn(46, 2, 12), drawn(46, 2, 12, seed=1), drawn(46, 4, 44)
    g = -drawn(46, 4, 12).abs() if by_channel else -drawn(46, 4).abs()
    if by_channel:
        q, k = drawn(46, 4, 12), drawn(46, 4, 12, seed=1)

    def formula(rows: list[Tensor]) -> Tensor:
        q, k, v, g, beta = (x.double() for x in rows)
        q, k = (x.repeat_interleave(4 // x.shape[1], 1) for x in (q, k))
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        state, out = torch.zeros(4, 12, 44, dtype=torch.float64), []
        for t in range(len(v)):
            state = state * (g[t][..., None] if by_channel else g[t][:, None, None]).exp()
            change = (v[t] - (state * k[t][..., None]).sum(1)) * beta[t][:, None]
            state = state + k[t][..., None] * change[:, None]
            out.append((state * q[t][..., None]).sum(1) / 12**0.5)
        return torch.stack(out)

    def run(at: Places, rows: list[Tensor], _: Tensor, states: Tensor) -> Tensor:
        q, k, v, g, beta = rows
        return cpu.delta_rule(at, q, k, v, g, beta, True, states[:, : 4 * 12 * 44].unflatten(1, (4, 12, 44)))

    return [q, k, v, g, drawn(46, 4, seed=5).sigmoid()], run, formula


def scan() -> tuple[list[Tensor], Run, Callable[[list[Tensor]], Tensor]]:
    a, d, bias = -drawn(6).abs(), drawn(6, seed=1), drawn(6, seed=2)

    def formula(rows: list[Tensor]) -> Tensor:
        x, dt, b, c = (part.double() for part in rows)
        delta = F.softplus(dt + bias).clamp(0.01, 2.0)
        b, c = (part.repeat_interleave(3, 1) for part in (b, c))
        state, out = torch.zeros(6, 10, 20, dtype=torch.float64), []
        for t in range(len(x)):
            write = (delta[t][:, None] * x[t])[..., None] * b[t][:, None]
            state = state * (delta[t] * a).exp()[:, None, None] + write
            out.append((state * c[t][:, None]).sum(-1) + d[:, None] * x[t])
        return torch.stack(out)

    def run(at: Places, rows: list[Tensor], _: Tensor, states: Tensor) -> Tensor:
        own = states[:, : 6 * 10 * 20].unflatten(1, (6, 10, 20))
        x, dt, b, c = rows
        return cpu.scan(at, x, dt, a, b, c, d, bias, True, (0.01, 2.0), own)

    return [drawn(46, 6, 10), drawn(46, 6), drawn(46, 2, 20), drawn(46, 2, 20, seed=7)], run, formula


def selective_scan() -> tuple[list[Tensor], Run, Callable[[list[Tensor]], Tensor]]:
    a, d, bias = -drawn(34, 20).abs(), drawn(34), drawn(34, seed=2)

    def formula(rows: list[Tensor]) -> Tensor:
        x, dt, b, c, z = (part.double() for part in rows)
        delta, state, out = F.softplus(dt + bias), torch.zeros(34, 20, dtype=torch.float64), []
        for t in range(len(x)):
            state = state * (delta[t][:, None] * a).exp() + (delta[t] * x[t])[:, None] * b[t]
            out.append(((state * c[t]).sum(-1) + d * x[t]) * F.silu(z[t]))
        return torch.stack(out)

    def run(at: Places, rows: list[Tensor], _: Tensor, states: Tensor) -> Tensor:
        x, dt, b, c, z = rows
        return cpu.selective_scan(at, x, dt, a, b, c, d, z, bias, True, states[:, : 34 * 20].unflatten(1, (34, 20)))

    rows = [drawn(46, 34), drawn(46, 34, seed=1), drawn(46, 20), drawn(46, 20, seed=3), drawn(46, 34, seed=4)]
    return rows, run, formula


KINDS = {
    "convolution": convolution,
    "delta rule": lambda: delta_rule(False),
    "delta rule by channel": lambda: delta_rule(True),
    "scan": scan,
    "selective scan": selective_scan,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[list[Tensor], Run, Callable[[list[Tensor]], Tensor]]:
    return KINDS[request.param]()


def states() -> tuple[Tensor, Tensor]:
    """Of five slots: what convolutions keep, and what recurrences do, more of it than any uses."""
    return torch.zeros(5, 70, 4), torch.zeros(5, 3000)


def by_sequence(rows: list[Tensor]) -> list[list[Tensor]]:
    return [list(parts) for parts in zip(*(x.split(LENGTHS) for x in rows), strict=True)]


@pytest.mark.parametrize("isa", cpu.extension.isas)
def test_packed_rows_give_what_the_formula_gives_for_each_sequence(isa: str, kind):
    """In every instruction set of this processor, with slots in any order."""
    rows, run, formula = kind
    with cpu.extension.limited_to(isa):
        got = run(places(LENGTHS, SLOTS), rows, *states()).split(LENGTHS)
    for found, own in zip(got, by_sequence(rows), strict=True):
        torch.testing.assert_close(found.double(), formula(own).double(), rtol=1e-4, atol=1e-4)


def test_other_steps_give_the_same_bits(kind):
    """However a sequence is cut, and whoever is computed beside it."""
    rows, run, _ = kind
    whole = run(places(LENGTHS, SLOTS), rows, *states()).split(LENGTHS)
    kept, done = states(), [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    for cut in CUTS:
        parts = [[own[at : at + n] for own, at, n in zip(x.split(LENGTHS), done, cut, strict=True)] for x in rows]
        step = [torch.cat(part) for part in parts]
        for i, part in enumerate(run(places(cut, SLOTS), step, *kept).split(cut)):
            found[i].append(part)
            done[i] += cut[i]
    for one, pieces in zip(whole, found, strict=True):
        assert torch.equal(torch.cat(pieces), one)


@pytest.mark.parametrize("wrong", ["rows", "slots", "starts"])
def test_what_lies_beyond_a_tensor_is_refused(kind, wrong: str) -> None:
    """Fewer rows than the sequences have, a slot that the pool does not have, and an order that is none."""
    rows, run, _ = kind
    at = Places(
        torch.tensor([0, 37, 40 if wrong == "starts" else 38, 39 if wrong == "starts" else 46]),
        torch.tensor([2, 0, 5 if wrong == "slots" else 3]),
    )
    with pytest.raises(ValueError, match="the native kernels expect"):
        run(at, [x[:-1] for x in rows] if wrong == "rows" else rows, *states())


def test_slots_of_others_are_left_alone(kind):
    rows, run, _ = kind
    kept = states()
    run(places(LENGTHS, SLOTS), rows, *kept)
    assert not any(x[slot].any() for x in kept for slot in (1, 4))
