"""A forward attends to what it was given, whatever other threads and other forwards do with the same model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from octavo.models.bind import Attend, BoundModel


def run(bound: BoundModel, attend: Attend) -> Tensor:
    rows = torch.arange(5)
    return bound.forward(rows + 7, rows, rows, attend)


def only_itself(_layer: int, q: Tensor, _k: Tensor, v: Tensor) -> Tensor:
    """Attention in which every row sees itself alone."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def only_nothing(_layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    return torch.zeros_like(q)


def test_two_threads_run_forwards_over_one_model(llama: BoundModel):
    alone = [run(llama, attend) for attend in (only_itself, only_nothing)]
    together = threading.Barrier(2)

    def in_step(attend: Attend) -> Tensor:
        def wait(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            together.wait(10)  # in every layer both forwards are under way
            return attend(layer, q, k, v)

        return run(llama, wait)

    with ThreadPoolExecutor(2) as pool:
        mixed = list(pool.map(in_step, (only_itself, only_nothing)))
    assert not torch.equal(*alone)
    for got, want in zip(mixed, alone, strict=True):
        torch.testing.assert_close(got, want)


def test_a_forward_within_a_forward_is_refused(llama: BoundModel):
    def nested(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run(llama, only_itself)
        return only_itself(layer, q, k, v)

    with pytest.raises(AssertionError, match="within another forward"):
        run(llama, nested)


def test_a_failed_forward_leaves_the_next_one_alone(llama: BoundModel):
    def broken(_layer: int, _q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        raise ZeroDivisionError

    want = run(llama, only_itself)
    with pytest.raises(ZeroDivisionError):
        run(llama, broken)
    assert torch.equal(run(llama, only_itself), want)
    with pytest.raises(RuntimeError, match=r"through BoundModel\.forward"):
        llama.hf(input_ids=torch.tensor([[1]]))
