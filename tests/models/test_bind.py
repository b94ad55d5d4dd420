"""A forward attends to what it was given, whatever other threads and other forwards do with the same model."""

from __future__ import annotations

import copy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from octavo.engine.reading import Reading
from octavo.errors import Unsupported
from octavo.models.bind import BoundModel, bind
from octavo.models.hook import Attend
from octavo.models.model import BUNDLED, Model


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


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 10000.0}


def rotary(rope: dict, context: int | None = None, dtype: torch.dtype = torch.float32) -> str:
    return bind(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).to(dtype), context).rotary


def test_rope_settings_are_told_apart_by_theta_scaling_and_attention_factor_but_not_by_weights_or_context():
    yarn = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    different = [
        THETA,
        {**THETA, "rope_theta": 500000.0},
        {**THETA, "rope_type": "linear", "factor": 2.0},
        yarn,
        {**yarn, "attention_factor": 1.5},
    ]
    names = [rotary(rope) for rope in different]
    assert len(set(names)) == len(names)
    assert rotary(THETA, context=64) == names[0]
    # Frequencies in four digits, which float32 has on every device.
    assert rotary({**THETA, "rope_theta": 10000.001}) == names[0]


def test_longrope_pinned_to_another_context_is_another_rope():
    rope = {
        **THETA, "rope_type": "longrope", "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.2, 2.4, 2.6],
    }  # fmt: skip

    def pinned(context: int | None) -> BoundModel:
        return bind(
            Phi3ForCausalLM(Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=rope)), context
        )

    assert pinned(60).rotary == pinned(64).rotary != pinned(128).rotary == pinned(None).rotary
    # Sessions cannot grow beyond what the factors are for.
    assert (pinned(60).max_context, pinned(128).max_context, pinned(None).max_context) == (64, 256, 256)


def test_a_longrope_model_takes_the_short_factors_unless_longer_sessions_are_asked_for(tmp_path: Path):
    """Short prompts are then computed as transformers computes them; that sessions end earlier is said."""
    rope = {
        **THETA, "rope_type": "longrope", "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    shutil.copytree(BUNDLED, tmp_path / "phi", ignore=shutil.ignore_patterns("*.safetensors"))
    config = Phi3Config(
        **SIZES | {"vocab_size": 4096, "initializer_range": 0.3},
        eos_token_id=2,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )
    hf = Phi3ForCausalLM(config).eval()
    hf.save_pretrained(tmp_path / "phi")
    ids = torch.arange(20)
    with pytest.warns(UserWarning, match="up to 64 tokens and others for longer ones: the first are used"):
        short = Model.load(tmp_path / "phi", device="cpu", dtype="fp32").bound
    long = Model.load(tmp_path / "phi", device="cpu", dtype="fp32", context=128).bound
    with torch.inference_mode():
        expected = hf(input_ids=ids[None]).logits[0].log_softmax(-1)
    for bound, same in ((short, True), (long, False)):
        found = torch.cat(list(Reading(bound).logits(ids.tolist())))
        error = (found.log_softmax(-1) - expected).abs().max()
        assert bool(error < 1e-4) is same


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
def test_a_model_that_overflows_everywhere_is_refused_with_that_reason(llama: BoundModel, where: str):
    hf = copy.deepcopy(llama.hf).half()
    with torch.no_grad():
        dict(hf.named_modules())[where if where == "lm_head" else f"model.{where}"].weight.fill_(6e4)
        hf.model.layers[0].self_attn.k_proj.weight.fill_(6e4 if where == "embed_tokens" else 0.1)
    with pytest.raises(Unsupported, match=r"llama overflows in float16: .* not finite\. Choose a --dtype .*fp32"):
        bind(hf)
