"""`octavo.attach`: transformers' own `generate` over codes gives the engine's answers; the model is left as it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel, TextStreamer, pipeline

import octavo
import octavo.attachment
from octavo.attention import backend_for
from octavo.cache.plan import plan_layers
from octavo.errors import OctavoError, Unsupported
from octavo.models.bind import bind
from octavo.models.hook import NAME, attended
from octavo.models.load import load_model
from octavo.models.model import BUNDLED, Model
from octavo.quant.format import KVFormat
from tests.conftest import tiny_llama
from tests.engine.driving import engine, run
from tests.engine.test_transformers import with_own_head
from tests.models import zoo

pytestmark = pytest.mark.filterwarnings("ignore:.*runs without a calibration")

# What each brings beyond plain multi-head attention with RoPE:
ARCHITECTURES = (
    "deepseek_v3",  # latent attention: keys and values of different dims
    "gemma2",  # windows in every other layer, soft caps
    "gemma3_text",  # windows, two RoPEs
    "gemma4_text",  # layers that share K and V, and compute a prompt's last row alone; two dims
    "gpt2",  # learned positions
    "gpt_oss",  # sinks, windows, experts
    "llama",
    "mistral",  # a window
    "phi3",  # fused qkv
    "qwen2",  # biases
)


@pytest.fixture(scope="module")
def hf() -> PreTrainedModel:
    """A tiny random Llama that was never bound."""
    return tiny_llama(max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """A batch as tokenizers make it: padding at the left, and a mask that hides it."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def generated(hf: PreTrainedModel, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    inputs = padded(prompts)
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0} | options
    return hf.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_gets_the_answers_of_the_engine(name: str):
    """Ten architectures: `generate` over the attached cache and our engine choose the same tokens."""
    model = with_own_head(zoo.build(name))
    model.generation_config.eos_token_id = None
    prompts = random_prompts(3, 30, 11, 1)
    bound = bind(deepcopy(model))
    layout = backend_for(plan_layers(bound.whole, KVFormat.parse("int8-token"))).layout  # of the same arithmetic
    expected = [sequence.output for sequence in run(engine(bound, "int8-token", layout=layout), prompts, 12)]
    assert sum(len(set(answer)) > 4 for answer in expected) > 1, "the model repeats itself: nothing to compare"
    with octavo.attach(model, kv="int8-token") as cache:
        assert generated(model, prompts, 12, past_key_values=cache) == expected


def engine_answers(model: Model, kv: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    llm = octavo.LLM(model, kv=kv, prefix_caching=False)
    return [sequence.output for sequence in run(llm.engine, prompts, tokens)]


@pytest.mark.filterwarnings("ignore:.*needs a calibration")
@pytest.mark.parametrize("kv", ["kv8", "kv4", "k8v4+edges128"])
def test_every_kind_of_format_gives_the_answers_of_the_engine(hf: PreTrainedModel, kv: str):
    """Over several blocks and spans, through the native kernels, calibrated first where the format asks for it."""
    prompts = random_prompts(150, 30, 64, 65)
    with octavo.attach(hf, kv=kv) as cache:
        got = generated(hf, prompts, 80, past_key_values=cache)
    assert got == engine_answers(Model.of(deepcopy(hf), BUNDLED), kv, prompts, 80)


def test_the_cache_takes_the_bytes_of_the_codes_and_grows_with_the_text(hf: PreTrainedModel):
    """A row of int8-token is dim + 1 bytes; the cache holds whole blocks and at most a quarter more."""
    with octavo.attach(hf, kv="int8-token") as cache:
        generated(hf, random_prompts(300), 100, past_key_values=cache)
        row = 2 * 2 * 2 * (8 + 1)  # layers, K and V, KV heads
        assert 399 * row <= cache.nbytes <= 1.25 * 448 * row


@pytest.mark.parametrize("kv", ["fp32", "kv8"])
def test_beams_are_scored_as_without_sharing(hf: PreTrainedModel, kv: str):
    """Beam search forks and drops sequences in every step: the score of the best beam is that of a fresh forward."""
    prompts = random_prompts(100, 40)
    inputs = padded(prompts)
    with torch.no_grad(), octavo.attach(hf, kv=kv) as cache:
        out = hf.generate(
            **inputs, past_key_values=cache, num_beams=4, do_sample=False, max_new_tokens=60, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert cache.batch_size == 8
        (pool,) = cache.sequences.pools
        held = {block for row in cache.sequences.rows for block in row.tables[0]}
        pool.check()
        assert pool.used == len(held), "a dropped beam keeps its blocks"
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 60, dtype=torch.int64)], 1)
        cache.reset()
        width = inputs["input_ids"].shape[1]
        scores = torch.zeros(2)
        for start, end in [(0, width), *((i, i + 1) for i in range(width, width + 59))]:
            logits = hf(out.sequences[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            scores += logits[:, -1].log_softmax(-1).gather(1, out.sequences[:, end : end + 1])[:, 0]
    torch.testing.assert_close(out.sequences_scores, scores, atol=2e-3, rtol=1e-4)
    if kv == "fp32":
        own = hf.generate(**inputs, num_beams=4, do_sample=False, max_new_tokens=60, length_penalty=0.0)
        assert torch.equal(out.sequences, own)


@pytest.mark.parametrize("kv", ["kv8", "k8v4+edges128"])
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(hf: PreTrainedModel, kv: str):
    """Tokens that are guessed and refused are cropped away, also back over the begin of a span."""
    (prompt,) = random_prompts(40)
    prompt = prompt * 3
    with octavo.attach(hf, kv=kv) as cache:
        plain = generated(hf, [prompt], 150, past_key_values=cache)
    with octavo.attach(hf, kv=kv) as cache:
        guessed = generated(hf, [prompt], 150, past_key_values=cache, prompt_lookup_num_tokens=7)
    assert guessed == plain


def test_an_assistant_model_may_have_its_codes_too(hf: PreTrainedModel):
    (prompt,) = random_prompts(70)
    with octavo.attach(hf, kv="kv8") as cache:
        plain = generated(hf, [prompt], 40, past_key_values=cache)
    assistant = deepcopy(hf)
    with octavo.attach(hf, kv="kv8") as cache, octavo.attach(assistant, kv="kv8"):
        assert generated(hf, [prompt], 40, past_key_values=cache, assistant_model=assistant) == plain


@pytest.mark.parametrize("kv", ["kv8", "k8v4+edges128"])
@pytest.mark.parametrize("length", [126, 129, 200])
def test_what_was_cropped_leaves_no_trace(hf: PreTrainedModel, kv: str, length: int):
    """With the past recorded, a crop back into the span before gives the same bits as a text that never was longer."""
    ids = torch.tensor(random_prompts(230))

    def rest(cache: octavo.attachment.CodedCache) -> Tensor:
        return torch.cat([hf(ids[:, i : i + 3], past_key_values=cache).logits for i in range(length, 224, 3)], 1)

    with torch.no_grad(), octavo.attach(hf, kv=kv) as cache:
        hf(ids[:, :length], past_key_values=cache)
        expected = rest(cache)
        cache.reset()
        cache.activate_past_recording()
        hf(ids[:, :100], past_key_values=cache)
        hf(ids[:, 100:length], past_key_values=cache)
        span = cache.format.edges
        hf(ids.flip(1)[:, : (length // span + 1) * span - length + 2], past_key_values=cache)  # two rows beyond
        cache.crop(length - cache.get_seq_length())
        assert cache.get_seq_length() == length
        torch.testing.assert_close(rest(cache), expected, atol=1e-5, rtol=1e-5)


def test_a_crop_beyond_what_was_recorded_reads_codes(hf: PreTrainedModel):
    """Raw rows that are gone are what their codes stand for: near, not equal."""
    ids = torch.tensor(random_prompts(300))
    with torch.no_grad(), octavo.attach(hf, kv="kv8") as cache:
        hf(ids[:, :120], past_key_values=cache)
        expected = hf(ids[:, 120:121], past_key_values=cache).logits
        hf(ids[:, 121:], past_key_values=cache)
        cache.crop(120 - 300)
        got = hf(ids[:, 120:121], past_key_values=cache).logits
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.02


@pytest.fixture(scope="module")
def windowed() -> PreTrainedModel:
    """A tiny random Gemma 3: two layers with a window of 70 tokens, one that sees all."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=70, layer_types=kinds, max_position_embeddings=1024,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kv", ["int8-token", "kv8", "k8v4+edges128"])
def test_blocks_behind_a_window_are_given_back(windowed: PreTrainedModel, kv: str):
    """A long prompt's too: what layers with a window keep does not grow with the text, and answers are the engine's."""
    prompts = random_prompts(800, 500)
    expected = engine_answers(Model.of(deepcopy(windowed), BUNDLED), kv, prompts, 30)
    with octavo.attach(windowed, kv=kv) as cache:
        assert generated(windowed, prompts, 30, past_key_values=cache) == expected
        whole, window = cache.sequences.pools
        for pool in (whole, window):
            pool.check()
        assert whole.used == 13 + 9  # of 829 and 529 rows
        assert window.used == 2 + 2  # of a window across two blocks
        assert len(window) < len(whole)


def test_a_deep_copy_and_beams_share_what_a_window_sees(windowed: PreTrainedModel):
    prompts = random_prompts(200)
    with octavo.attach(windowed, kv="kv8") as cache:
        whole = generated(windowed, prompts, 40, past_key_values=cache)
        cache.reset()
        first = generated(windowed, prompts, 15, past_key_values=cache)
        kept = deepcopy(cache)
        for one in (cache, kept):
            rest = generated(windowed, [prompts[0] + first[0]], 25, past_key_values=one)
            assert first[0] + rest[0] == whole[0]
        cache.reset()
        generated(windowed, prompts, 90, past_key_values=cache, num_beams=3)
        for pool, group in zip(cache.sequences.pools, (0, 1), strict=True):
            pool.check()
            held = {b for row in cache.sequences.rows for b in row.tables[group][row.behind[group] :]}
            assert pool.used == len(held)


@pytest.mark.parametrize("kv", ["int8-token", "kv8"])
def test_guesses_are_taken_back_in_layers_with_a_window(windowed: PreTrainedModel, kv: str):
    """While the past is recorded no block behind the window is given back before the next crop."""
    (prompt,) = random_prompts(60)
    prompt = prompt * 3
    with octavo.attach(windowed, kv=kv) as cache:
        plain = generated(windowed, [prompt], 100, past_key_values=cache)
    with octavo.attach(windowed, kv=kv) as cache:
        assert generated(windowed, [prompt], 100, past_key_values=cache, prompt_lookup_num_tokens=7) == plain
        assert cache.sequences.pools[1].used <= 3


def test_a_crop_to_what_a_window_has_lost_is_refused(windowed: PreTrainedModel):
    """And changes nothing; with the past recorded it is as if the text had never been longer."""
    ids = torch.tensor(random_prompts(400))
    with torch.no_grad(), octavo.attach(windowed, kv="int8-token") as cache:
        windowed(ids[:, :150], past_key_values=cache)
        expected = windowed(ids[:, 150:160], past_key_values=cache).logits
        windowed(ids[:, 160:380], past_key_values=cache)
        after = windowed(ids[:, 380:390], past_key_values=cache).logits
        with pytest.raises(OctavoError, match=r"240 tokens cannot be taken back: layers with a window of 70 have lost"):
            cache.crop(-240)
        cache.crop(-10)
        assert torch.equal(windowed(ids[:, 380:390], past_key_values=cache).logits, after)
        cache.reset()
        cache.activate_past_recording()
        windowed(ids[:, :390], past_key_values=cache)
        cache.crop(-240)
        torch.testing.assert_close(windowed(ids[:, 150:160], past_key_values=cache).logits, expected)


def test_a_conversation_goes_on_in_the_cache(hf: PreTrainedModel):
    """Two calls with one cache answer as one text does; a deep copy keeps the prompt for another answer."""
    (prompt,) = random_prompts(100)
    with octavo.attach(hf, kv="kv8") as cache:
        whole = generated(hf, [prompt], 60, past_key_values=cache)[0]
        cache.reset()
        first = generated(hf, [prompt], 20, past_key_values=cache)[0]
        kept = deepcopy(cache)
        second = generated(hf, [prompt + first], 40, past_key_values=cache)[0]
        assert first + second == whole
        assert generated(hf, [prompt + first], 40, past_key_values=kept)[0] == second


def test_inference_mode_and_grad_free_calls_share_a_cache(hf: PreTrainedModel):
    ids = torch.tensor(random_prompts(200))
    with octavo.attach(hf, kv="kv8") as cache, torch.no_grad():
        expected = hf(ids, past_key_values=cache).logits[:, -1]
    with torch.inference_mode():
        cache = octavo.attach(hf, kv="kv8")
        hf(ids[:, :70], past_key_values=cache)
    with torch.no_grad():
        hf(ids[:, 70:130], past_key_values=cache)
    with torch.inference_mode():
        got = hf(ids[:, 130:], past_key_values=cache).logits[:, -1]
    cache.detach()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_pipeline_and_a_streamer_take_the_cache(pamphlet: Model, capsys: pytest.CaptureFixture[str]):
    hf = load_model(BUNDLED, dtype="float32", device="cpu")
    pipe = pipeline("text-generation", model=hf, tokenizer=pamphlet.tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "max_length": None}
    plain = pipe("Once upon a time", **options)
    with octavo.attach(hf, kv="kv8") as cache:
        assert pipe("Once upon a time", past_key_values=cache, **options) == plain
        assert cache.columns > 12
        cache.reset()
        capsys.readouterr()
        inputs = pamphlet.tokenizer("Once upon a time", return_tensors="pt")
        streamer = TextStreamer(pamphlet.tokenizer, skip_special_tokens=True)
        hf.generate(**inputs, streamer=streamer, past_key_values=cache, **options)
    assert capsys.readouterr().out.strip() == plain[0]["generated_text"].strip()


def marks(hf: PreTrainedModel) -> Any:
    """All that attaching could leave in a model."""
    buffers = {name: buffer.clone() for name, buffer in hf.named_buffers()}
    types = [getattr(module, "rope_type", None) for module in hf.modules()]
    names = [sorted(vars(module)) for module in hf.modules()]
    hooks = len(hf._forward_pre_hooks), len(hf._forward_hooks)
    return hf.config._attn_implementation, hf.training, hooks, types, names, {k: v.tolist() for k, v in buffers.items()}


def test_the_model_is_as_it_was_once_the_last_cache_is_gone():
    """After an error too, in training, with RoPE that binding pins; two caches share the hook."""
    hf = zoo.build("llama+dynamic").train()
    hf.set_attn_implementation("sdpa")
    before = marks(hf)
    cache = octavo.attach(hf, kv="kv8")
    octavo.attach(hf, kv="fp32").detach()
    assert marks(hf) != before
    hf.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(IndexError), cache:  # a token that the model does not have
        hf(torch.tensor([[1000]]), past_key_values=cache)
    assert marks(hf) == before
    cache.detach()
    assert marks(hf) == before


def test_a_model_that_is_refused_is_as_it_was():
    hf = zoo.build("bloom")
    before = marks(hf)
    with pytest.raises(Unsupported, match="bloom"):
        octavo.attach(hf)
    assert marks(hf) == before
    hf = zoo.build("llama")
    before = marks(hf)
    with pytest.raises(OctavoError, match="no KV format"):
        octavo.attach(hf, kv="int9")
    with pytest.raises(OctavoError, match="int8 needs a calibration"):
        octavo.attach(hf, kv="int8")
    assert marks(hf) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_forwards_without_the_cache_are_as_before(hf: PreTrainedModel, implementation: str):
    hf = deepcopy(hf)
    hf.set_attn_implementation(implementation)
    inputs = padded(random_prompts(30, 12))
    with torch.no_grad():
        expected = hf(**inputs).logits
        answer = generated(hf, random_prompts(30, 12), 10)
        with octavo.attach(hf, kv="kv8"):
            assert torch.equal(hf(**inputs).logits, expected)
            assert torch.equal(hf(**inputs, past_key_values=DynamicCache(config=hf.config)).logits, expected)
            assert generated(hf, random_prompts(30, 12), 10) == answer


def interrupted(hf: PreTrainedModel, ids: Tensor, cache: octavo.attachment.CodedCache) -> None:
    """A forward that Ctrl-C ends once all layers have run; torch then calls no hook."""

    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    handle = hf.get_output_embeddings().register_forward_pre_hook(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        hf(ids, past_key_values=cache)
    handle.remove()


def test_forwards_without_the_cache_are_as_before_after_an_interrupt(hf: PreTrainedModel):
    ids, others = torch.tensor(random_prompts(30, 40)[:1]), torch.tensor(random_prompts(40, 30)[1:])
    with torch.no_grad():
        expected = hf(others).logits
        with octavo.attach(hf, kv="kv8") as cache:
            interrupted(hf, ids, cache)
            assert torch.equal(hf(others).logits, expected)
            assert cache.get_seq_length() == 0
            interrupted(hf, ids, cache)
        assert torch.equal(hf(others).logits, expected)
        assert attended.get() is None


def test_a_failed_forward_leaves_no_trace_or_asks_for_a_reset(hf: PreTrainedModel):
    """Raw rows of the span before are overwritten where it began a new one."""
    ids = torch.tensor(random_prompts(170))
    with torch.no_grad(), octavo.attach(hf, kv="kv8") as cache:
        for read, failed in ((100, 20), (100, 70)):
            cache.reset()
            hf(ids[:, :read], past_key_values=cache)
            kept = deepcopy(cache)
            interrupted(hf, ids[:, read : read + failed], cache)
            if failed == 70:
                with pytest.raises(OctavoError, match=r"reset\(\) it"):
                    hf(ids[:, read:], past_key_values=cache)
            else:
                expected = hf(ids[:, read:], past_key_values=kept).logits
                assert torch.equal(hf(ids[:, read:], past_key_values=cache).logits, expected)


def test_bad_input_is_one_sentence(hf: PreTrainedModel):
    """And leaves the cache as it was."""
    ids = torch.tensor(random_prompts(10))
    other = deepcopy(hf)
    with torch.no_grad(), octavo.attach(hf, kv="kv8") as cache, octavo.attach(other, kv="kv8"):
        hf(ids, past_key_values=cache)
        with pytest.raises(OctavoError, match="belongs to another model"):
            other(ids, past_key_values=cache)
        with pytest.raises(OctavoError, match="holds 1 sequences and the model was called with 2"):
            hf(ids.repeat(2, 1), past_key_values=cache)
        with pytest.raises(OctavoError, match=r"attention_mask is \[1, 4\]"):
            hf(ids, attention_mask=torch.ones(1, 4), past_key_values=cache)
        with pytest.raises(OctavoError, match="changes for tokens that are in the cache"):
            hf(ids, attention_mask=torch.tensor([[0] * 3 + [1] * 17]), past_key_values=cache)
        with pytest.raises(OctavoError, match="must be \\[batch, tokens\\]"):
            hf(ids, attention_mask=torch.ones(1, 1, 10, 20), past_key_values=cache)
        with pytest.raises(OctavoError, match="no attention weights"):
            hf(ids, past_key_values=cache, output_attentions=True)
        with pytest.raises(OctavoError, match="forwards of the whole model alone"):
            hf.model(ids, past_key_values=cache)
        with pytest.raises(OctavoError, match="no gradients"), torch.enable_grad():
            hf(ids, past_key_values=cache)
        assert cache.get_seq_length() == 10
    with pytest.raises(OctavoError, match="is detached"):
        hf(ids, past_key_values=cache)
    with pytest.raises(OctavoError, match="takes a loaded transformers model, not str"):
        octavo.attach("pamphlet")
    assert NAME not in vars(hf.model.layers[0].self_attn)
