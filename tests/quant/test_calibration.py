"""The artefact: what it keeps, and everything it refuses."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from octavo import artefact
from octavo.artefact import Artefact
from octavo.errors import OctavoError
from octavo.quant.calibration import FILE_NAME, Calibration, Header, Side
from octavo.quant.format import CODECS, validate_choice
from octavo.quant.statistics import Statistics, attention_static, range_static

FINGERPRINT = "sha256:" + "0f" * 32
SHAPES = [(2, 8, 8), (3, 6, 4)]
INT8 = CODECS["int8"]
HEADER = Header(FINGERPRINT, dataset="ptb", samples=4, seqlen=32, tokens=128, positions=(0, 4095))


def side(heads: int, dim: int, seed: int) -> Side:
    statistics = Statistics(heads, dim)
    generator = torch.Generator().manual_seed(seed)
    statistics.update(torch.randn(40, heads, dim, generator=generator) * 3 + torch.arange(dim))
    return {**statistics.summary(), "reader": torch.rand(heads, dim, generator=generator) + 0.5}


def make(header: Header = HEADER, shapes: list[tuple[int, int, int]] = SHAPES) -> Calibration:
    layers = [{"k": side(h, k, 2 * i), "v": side(h, v, 2 * i + 1)} for i, (h, k, v) in enumerate(shapes)]
    return Calibration(header, layers)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same(a: Calibration, b: Calibration) -> bool:
    return a.header == b.header and all(
        x.keys() == y.keys()
        and all(x[s].keys() == y[s].keys() and all(torch.equal(x[s][n], y[s][n]) for n in x[s]) for s in x)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def rewrite(path: Path, fields: dict[str, Any] | None = None, drop: str | None = None, **tensors: torch.Tensor) -> None:
    """Change an artefact's header fields or tensors, with checksums that are right."""
    header = json.loads(Artefact.open(path).header) | (fields or {})
    kept = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    artefact.write(path, header, {**kept, **tensors})


# Save and load


def test_an_artefact_round_trips_whole(tmp_path: Path) -> None:
    saved = make()
    path = saved.save(tmp_path)
    assert path == tmp_path / FILE_NAME
    assert files(tmp_path) == [FILE_NAME]
    for source in (path, tmp_path):  # the file, or the directory that holds it
        loaded = Calibration.load(source)
        assert same(loaded, saved)
        assert loaded.header.positions == (0, 4095)
        loaded.check(FINGERPRINT, "", SHAPES)


def test_the_file_is_plain_safetensors_with_a_json_header(tmp_path: Path) -> None:
    make().save(tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    expected = {f"layers.{i}.{letter}.{name}" for i in (0, 1) for letter in "kv" for name in side(1, 1, 0)}
    assert tensors.keys() == expected
    assert len(expected) > 2 * 2 * 4
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["layers.1.k.min"].shape == (3, 6)
    assert tensors["layers.1.v.max"].shape == (3, 4)
    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        header = json.loads(file.metadata()["octavo"])
    assert header == {
        "version": 2, "fingerprint": FINGERPRINT, "dataset": "ptb", "samples": 4, "seqlen": 32, "tokens": 128,
        "positions": [0, 4095], "granularity": "channel", "headroom": 1.4, "rotary": "",
    }  # fmt: skip


def test_the_default_granularity_and_headroom_are_recorded(tmp_path: Path) -> None:
    assert (HEADER.granularity, HEADER.headroom) == ("channel", 1.4)
    make(replace(HEADER, granularity="head", headroom=1.25)).save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert (loaded.header.granularity, loaded.header.headroom) == ("head", 1.25)
    ranges = loaded.layers[0]["k"]
    static, expected = loaded.static(0, "k", INT8), range_static(ranges["min"], ranges["max"], "head", 1.25)
    assert torch.equal(static.mu, expected.mu)
    assert torch.equal(static.c, expected.c)


def test_granularity_and_headroom_can_be_chosen_after_loading(tmp_path: Path) -> None:
    make().save(tmp_path)
    loaded = Calibration.load(tmp_path)
    default, wide = loaded.static(1, "v", INT8), loaded.choosing(headroom=2.8).static(1, "v", INT8)
    torch.testing.assert_close(wide.c, 2 * default.c)
    assert torch.equal(wide.mu, default.mu)
    ranges = loaded.layers[1]["v"]
    tensor = loaded.choosing("tensor", 1.0).static(1, "v", INT8)
    low, high = ranges["min"].min(), ranges["max"].max()
    torch.testing.assert_close(tensor.mu, ((low + high) / 2).expand(3, 4))
    torch.testing.assert_close(tensor.c, ((high - low) / 255).expand(3, 4))
    assert len(loaded.choosing("head").static(1, "v", INT8).mu.unique()) == 3


@pytest.mark.parametrize("codec", ["int8-token", "int4-token"])
def test_token_codecs_take_the_static_part_of_attention_whatever_the_granularity(codec: str) -> None:
    made = make()
    statistics = made.layers[1]["k"]
    expected = attention_static(statistics["mean"], statistics["std"], statistics["reader"])
    for choice in ((None, None), ("tensor", 3.0)):
        static = made.choosing(*choice).static(1, "k", CODECS[codec])  # type: ignore[arg-type]
        assert torch.equal(static.mu, expected.mu)
        assert torch.equal(static.c, expected.c)


def test_each_layer_and_side_has_its_own_ranges() -> None:
    statics = [make().static(layer, name, INT8).mu[0, :4] for layer in (0, 1) for name in "kv"]
    assert all(not torch.equal(a, b) for i, a in enumerate(statics) for b in statics[:i])


def test_many_layers_come_back_in_order(tmp_path: Path) -> None:
    saved = make(shapes=[(1, 2, 2)] * 12)  # "layers.10" sorts before "layers.2"
    saved.save(tmp_path)
    assert same(Calibration.load(tmp_path), saved)


def test_layers_may_share_their_statistics(tmp_path: Path) -> None:
    one = side(2, 8, 0)
    shared = Calibration(HEADER, [{"k": one, "v": one}, {"k": one, "v": one}])
    shared.save(tmp_path)
    assert same(Calibration.load(tmp_path), shared)


def test_saving_again_replaces_the_artefact(tmp_path: Path) -> None:
    make().save(tmp_path)
    again = make(replace(HEADER, dataset="c4"))
    again.save(tmp_path)
    assert same(Calibration.load(tmp_path), again)
    assert files(tmp_path) == [FILE_NAME]


def test_saving_makes_the_directory(tmp_path: Path) -> None:
    make().save(tmp_path / "a" / "b")
    assert same(Calibration.load(tmp_path / "a" / "b"), make())


# Refusals


@pytest.mark.parametrize("other", ["sha256:" + "0e" * 32, "synthetic", ""])
def test_a_calibration_of_other_weights_is_refused(other: str) -> None:
    with pytest.raises(OctavoError, match="other weights") as caught:
        make().check(other, "", SHAPES)
    assert "octavo calibrate" in str(caught.value)
    assert "kv8" in str(caught.value)


@pytest.mark.parametrize(
    "shapes",
    [
        SHAPES[:1], [*SHAPES, (2, 8, 8)], SHAPES[::-1], [(2, 8, 8), (3, 4, 6)], [(2, 8, 8), (4, 6, 4)],
        [(1, 8, 8), (3, 6, 4)], [(2, 8, 8), (3, 6, 6)], [],
    ],
)  # fmt: skip
def test_a_calibration_of_another_geometry_is_refused(shapes: list[tuple[int, int, int]]) -> None:
    with pytest.raises(OctavoError, match="layers") as caught:
        make().check(FINGERPRINT, "", shapes)
    assert "octavo calibrate" in str(caught.value)


def test_a_missing_artefact_is_an_error_that_says_how_to_make_it(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / FILE_NAME, tmp_path / "nowhere" / FILE_NAME):
        with pytest.raises(OctavoError, match="octavo calibrate"):
            Calibration.load(path)


def test_a_file_torn_anywhere_is_refused(tmp_path: Path) -> None:
    path = make().save(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(OctavoError, match=FILE_NAME):
            Calibration.load(tmp_path)


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 1000, b"\xff" * 64, b"PK\x03\x04" + b"x" * 500])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(OctavoError, match=FILE_NAME):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("version", [0, 1, "2.5", None])
def test_another_version_is_refused_by_its_number(tmp_path: Path, version: Any) -> None:
    path = make().save(tmp_path)
    rewrite(path, {"version": version})
    with pytest.raises(OctavoError, match=f"version {version!r}.*octavo calibrate"):
        Calibration.load(path)


@pytest.mark.parametrize(
    "fields",
    [{"granularity": "row"}, {"headroom": 0}, {"headroom": -1.5}, {"headroom": float("nan")}, {"headroom": 1e9}],
)
def test_a_header_with_a_choice_that_makes_no_sense_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = make().save(tmp_path)
    rewrite(path, fields)
    with pytest.raises(OctavoError, match=next(iter(fields))):
        Calibration.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.0.k.min", "layers.1.v.max", "layers.1.k.mean"])
def test_ranges_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    path = make().save(tmp_path)
    tensor = load_file(path)[name]
    tensor[-1, -1] = value
    rewrite(path, **{name: tensor})
    _, layer, letter, _ = name.split(".")
    with pytest.raises(OctavoError, match=f"{letter.upper()} statistics of layer {layer}"):
        Calibration.load(path)


@pytest.mark.parametrize("name", ["layers.0.k.min", "layers.1.v.max", "layers.0.k.std", "layers.1.v.reader"])
def test_statistics_that_are_missing_are_refused(tmp_path: Path, name: str) -> None:
    path = make().save(tmp_path)
    rewrite(path, drop=name)
    with pytest.raises(OctavoError, match="missing"):
        Calibration.load(path)


def test_a_layer_that_is_missing_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = make(shapes=[(1, 2, 2)] * 3).save(tmp_path)
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("layers.1.")}
    artefact.write(path, json.loads(Artefact.open(path).header), kept)
    with pytest.raises(OctavoError, match="layer 1"):
        Calibration.load(path)


@pytest.mark.parametrize(("granularity", "headroom"), [("tensor", 1.0), ("head", 0.1), ("channel", 100)])
def test_a_choice_that_makes_sense_is_accepted(granularity: str, headroom: float) -> None:
    validate_choice(granularity, headroom)


@pytest.mark.parametrize(("granularity", "headroom"), [("", 1.0), ("token", 1.0), ("head", 0.0), ("head", 101.0)])
def test_a_choice_that_makes_no_sense_is_refused(granularity: str, headroom: float) -> None:
    with pytest.raises(OctavoError):
        validate_choice(granularity, headroom)
    with pytest.raises(OctavoError):
        make().choosing(granularity, headroom)  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OctavoError, match="--work-dir"):
            make().save(directory)
    assert files(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_artefact_and_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make()
    old.save(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(OctavoError, match=r"No space left.*--work-dir") as caught:
        make(replace(HEADER, dataset="c4")).save(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(caught.value)
    assert files(tmp_path) == [FILE_NAME]
    assert same(Calibration.load(tmp_path), old)
