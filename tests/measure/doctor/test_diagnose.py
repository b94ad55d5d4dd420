"""The doctor: a plain model passes, a key-biased one is singled out, and a broken one fails the self-check."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.biased import CHANNELS, save_biased
from octavo.attention import attend
from octavo.errors import OctavoError
from octavo.measure.as_json import dumps
from octavo.measure.budget import Budget, Windows
from octavo.measure.doctor import diagnose as doctor
from octavo.measure.doctor.advice import findings, listed
from octavo.measure.doctor.diagnose import diagnose, flip_last_bit, windows
from octavo.measure.doctor.diagnosis import Diagnosis, Finding
from octavo.measure.doctor.inspection import examine, keys, widths
from octavo.measure.doctor.selfcheck import self_check
from octavo.measure.pace import Pace
from octavo.models.bind import BoundModel, bind
from octavo.models.locate import PROSE
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from octavo.quant.format import ADVISED
from tests.models import zoo


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Two windows are read in place of eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "WANTED", Windows(2, 512))
        yield


@pytest.fixture(scope="module")
def plain(pamphlet: Model) -> Diagnosis:
    return diagnose(pamphlet)


@pytest.fixture(scope="module")
def biased_model(pamphlet: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(save_biased(pamphlet, tmp_path_factory.mktemp("biased")), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def biased(biased_model: Model) -> Diagnosis:
    return diagnose(biased_model)


def finding(found: Diagnosis, topic: str) -> Finding:
    return next(finding for finding in found.findings if finding.topic == topic)


def test_a_plain_model_is_healthy_and_is_advised_kv8_first(plain: Diagnosis) -> None:
    assert plain.healthy
    topics = ["binding", "self-check", "key biases", "outlier channels", "formats", "calibration"]
    assert [(f.level, f.topic) for f in plain.findings] == [("ok", topic) for topic in topics]
    scores = {score.name: score for score in plain.formats}
    assert not any(layer.biased for layer in plain.keys)
    assert [plain.grade(scores[name]) for name in ("kv8", "int8")] == ["good", "good"]
    assert scores["kv8"].kl < scores["k8v4"].kl < scores["kv4"].kl
    assert 0 < plain.rounding < 1e-3


def test_the_verdict_names_every_row_with_its_grade_and_the_first_good_one_to_serve(plain: Diagnosis) -> None:
    text = finding(plain, "formats").text
    grades = plain.grades
    for grade in ("good", "usable", "poor"):
        own = [name for name in ADVISED if grades[name] == grade]
        assert (f"{grade}: {', '.join(own)}" in text) is bool(own)
    assert f"serve with --kv {next(name for name in ADVISED if grades[name] == 'good')}" in text


def test_key_biases_are_singled_out_layer_by_layer_with_what_to_do(biased: Diagnosis) -> None:
    assert [layer.layer for layer in biased.keys if layer.biased] == [0, 5]
    assert biased.keys[0].channels == 2 * len(CHANNELS)
    assert biased.keys[0].bias_norm == pytest.approx(math.sqrt(2 * sum(b * b for b in CHANNELS.values())), rel=1e-3)
    text = finding(biased, "key biases").text
    assert "layers 0 and 5" in text
    assert "Qwen2" in text
    assert "kv8 can be served without one" in finding(biased, "calibration").text, "the rotation carries it"


def graded(found: Diagnosis, **kl: float) -> list[Finding]:
    """The findings, had these formats lost as much; _ stands for `, un`."""
    names = {name.replace("_", ", un"): value for name, value in kl.items()}
    return findings(replace(found, formats=[replace(s, kl=names.get(s.name, s.kl)) for s in found.formats]))


def test_where_8_bits_lose_much_without_a_calibration_one_is_to_be_made_first(biased: Diagnosis) -> None:
    advice = next(f for f in graded(biased, kv8_calibrated=1e-2) if f.topic == "calibration")
    assert advice.level == "note"
    assert "octavo calibrate" in advice.text


def test_what_loses_too_much_is_called_poor_and_not_advised(plain: Diagnosis) -> None:
    advice = {f.topic: f for f in graded(plain, kv4=1.0, int8=1.0)}
    assert "poor: kv4, int8" in advice["formats"].text
    assert "scarce with k8v4" in advice["formats"].text
    none = next(f for f in graded(plain, kv8=1.0, k8v4=1.0, kv4=1.0, int8=1.0) if f.topic == "formats")
    assert (none.level, "stay with 16 bits" in none.text) == ("warning", True)


def test_a_grade_counts_two_standard_errors_so_that_few_windows_promise_nothing(plain: Diagnosis) -> None:
    sure = replace(plain.formats[0], kl=5e-4, kl_error=1e-5)
    assert plain.grade(sure) == "good"
    assert plain.grade(replace(sure, kl_error=4e-4)) == "usable"
    assert plain.grade(replace(sure, kl_error=float("nan"))) == "good", "a single window has no error"


def test_the_advice_rests_on_what_was_measured(biased: Diagnosis) -> None:
    kl = {score.name: score.kl for score in biased.formats}
    assert kl["kv8, uncalibrated"] > 3 * kl["kv8"]
    worst = sorted(range(6), key=lambda layer: -biased.layers["int8-token"][layer])[:2]
    assert sorted(worst) == [0, 5], "the layers with the biases are those whose quantization hurts"


def test_the_document_is_json_and_names_the_grades(biased: Diagnosis) -> None:
    found = json.loads(dumps({"command": "doctor", **biased.document()}))
    assert found["healthy"] is biased.healthy
    assert {row["grade"] for row in found["formats"]} <= {"good", "usable", "poor"}
    assert found["keys"][0]["channels"] == 8
    assert "kl_by_bin" not in found["formats"][0]


def test_offsets_are_seen_where_the_bias_is_fused_with_others_too(pamphlet: Model, text_ids: list[int]) -> None:
    def offset(k: Tensor) -> Tensor:  # as from a fused projection: no parameter tells of it
        return k + torch.tensor([50.0] + [0.0] * (k.shape[-1] - 1))

    model = pamphlet.bound
    forward = type(model).forward

    class Fused(BoundModel):
        def forward(self, ids, positions, logits_at, attend, *more):  # type: ignore[no-untyped-def]
            return forward(model, ids, positions, logits_at, lambda i, q, k, v: attend(i, q, offset(k), v), *more)

    fused = Fused(model.hf, model.max_context)
    fused.layers = model.layers
    assert all(own.bias_norm is None and own.channels == 2 for own in keys(fused, text_ids[:128]))


def test_a_model_that_mixes_sequences_fails_the_self_check(pamphlet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attend

    def leaks(spec, cache, q, k, v, batch):  # type: ignore[no-untyped-def]
        out = right(spec, cache, q, k, v, batch)
        return out + 0.5 * out.mean(0) if len(batch.q_lens) > 1 else out

    assert self_check(pamphlet.bound).passed
    monkeypatch.setattr("octavo.models.bound.attend", leaks)
    found = self_check(pamphlet.bound)
    assert not found.passed
    assert found.alone[0] > found.tolerance


def test_what_the_processor_would_have_faster_is_noted(plain: Diagnosis) -> None:
    left = "computes 2 of 4 layers module by module, which is slower: they are not of the form"
    notes = [one.text for one in findings(replace(plain, slower=[left])) if one.level == "note"]
    assert f"the model {left}" in notes
    assert not any("slower" in one.text for one in plain.findings)


def test_a_failed_self_check_advises_against_serving(plain: Diagnosis) -> None:
    assert plain.self_check is not None
    broken = replace(plain, self_check=replace(plain.self_check, alone=(0.4, 0.9)), findings=[])
    broken.findings = findings(broken)
    assert not broken.healthy
    assert "Do not serve" in finding(broken, "self-check").text


@pytest.mark.parametrize(
    ("name", "rope"), [("gemma3_text", "sliding_attention: default, base 10000"), ("gpt2", "none"), ("gpt_oss", "yarn")]
)
def test_anatomy_says_what_a_model_is(name: str, rope: str) -> None:
    bound = bind(zoo.build(name))
    found = examine(bound)
    assert found.layers == len(bound.layers) == sum(len(group.layers) for group in found.groups)
    assert found.rope.startswith(rope)
    assert found.shift_invariant is (name != "gpt2")
    assert any(group.sinks for group in found.groups) is (name == "gpt_oss")
    assert self_check(bound).passed


def test_widths_are_those_of_the_calibration(calibration: Calibration) -> None:
    found = widths(calibration)
    ranges = calibration.layers[1]["v"]
    width = (ranges["max"] - ranges["min"]).flatten()
    v1 = next(w for w in found if (w.layer, w.side) == (1, "V"))
    assert (v1.widest, v1.median) == (width.max().item(), width.median().item())


def test_flipping_the_last_bit_moves_every_value_by_one_step() -> None:
    x = torch.randn(100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        flipped = flip_last_bit(x.to(dtype))
        assert flipped.dtype == dtype
        assert ((flipped - x.to(dtype)).abs() <= 2**-6 * x.abs().to(dtype)).all()
        assert (flipped != x.to(dtype)).float().mean() > 0.9


def test_layers_arelisted_as_people_do() -> None:
    assert [listed(layers) for layers in ([3], [0, 5], [0, 1, 2, 7], [1, 2])] == [
        "3",
        "0 and 5",
        "0–2 and 7",
        "1 and 2",
    ]


def test_a_slow_model_sees_fewer_windows_and_no_layers_one_by_one_and_that_is_said(
    pamphlet: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Pace(row=0.01, logits=0.2, step=1.0, more=0.1)
    monkeypatch.setattr(doctor.Pace, "measure", lambda *_: slow)
    monkeypatch.setattr(doctor, "LEAST", Windows(1, 256))
    said: list[str] = []
    found = diagnose(pamphlet, budget=Budget.parse("10s"), say=said.append)
    assert said[0].startswith("measuring on 1 window of 256 tokens in 7 formats")
    assert "cut from 2 of 512 to fit --budget 10s" in said[0]
    assert "layers are not tried" in said[1]
    assert found.measured == "1 windows of 256 tokens"
    assert found.layers == {}


def test_a_text_too_short_is_refused_with_both_numbers(pamphlet: Model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    with pytest.raises(OctavoError, match=r"short.txt has \d+ tokens and the doctor needs 7,680"):
        diagnose(pamphlet, str(text))


def test_the_bundled_text_is_long_enough_for_all_that_is_wanted_of_it(pamphlet: Model) -> None:
    """Also where a tokenizer makes a quarter fewer tokens of it than the bundled model's: SmolLM2's has 15,205."""
    name, calibrated, measured = windows(pamphlet, None, 8, Windows(8, 512))
    assert (name, len(calibrated), len(measured)) == ("evaluation.txt", 8, 8)
    tokens = len(pamphlet.tokenizer(PROSE.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    assert 0.75 * tokens > 5 * 512 * 4
