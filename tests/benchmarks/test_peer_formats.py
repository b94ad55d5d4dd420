"""Peers' cache formats: what is simulated is what they store."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import peer_formats
from octavo.measure.accuracy.compare import measured
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.quant.format import KVFormat

FP32 = Candidate("fp32", KVFormat.parse("fp32"))


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_llama_cpps_rounding_is_that_of_its_own_python(name: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="needs the peers extra")
    gguf = pytest.importorskip("gguf")
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0)) * 3
    x[0] = 0
    kind = gguf.GGMLQuantizationType[name.upper()]
    stored = quants.dequantize(quants.quantize(x.numpy(), kind), kind).reshape(x.shape)
    ours = getattr(peer_formats, f"_{name}")(x).numpy()
    np.testing.assert_allclose(ours, stored, rtol=1e-6, atol=1e-6)


def test_kivi_leaves_the_last_128_rows_as_they_are_and_rounds_those_before(pamphlet: Model, text_ids: list[int]):
    kivi = peer_formats.candidates(pamphlet)[-1]
    window = text_ids[:257]
    _, read = measured(pamphlet, [FP32, kivi], [window, window])  # twice: nothing is left from the text before
    by_position = read.kl.mean(0)
    assert by_position[: peer_formats.RECENT].abs().max() < 1e-6  # other sums of the same numbers
    assert by_position[peer_formats.RECENT + 8 :].mean() > 1e-5


def test_every_format_has_a_name_and_a_size(pamphlet: Model) -> None:
    assert [candidate.name for candidate in peer_formats.candidates(pamphlet)] == list(peer_formats.BITS)
