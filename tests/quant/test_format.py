"""The names of the formats, and the bytes they promise."""

from __future__ import annotations

import dataclasses
import doctest

import pytest

from octavo.errors import OctavoError
from octavo.quant import format as module
from octavo.quant.format import CODECS, RAW_NAMES, Codec, KVFormat

NAMES = [
    "bf16",
    "fp16",
    "fp32",
    "int8",
    "fp8",
    "int8-token",
    "int8-token-unrotated",
    "int4-token",
    "int4-token-unrotated",
]
BY_DIGITS = {"16": "bf16", "8": "int8-token", "4": "int4-token"}


def test_the_formats_are_the_documented_ones() -> None:
    assert list(CODECS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_parses_to_the_same_codec_twice_and_prints_as_itself(name: str) -> None:
    format = KVFormat.parse(name)
    assert format == KVFormat(CODECS[name], CODECS[name])
    assert str(format) == name
    assert str(format.k) == name


@pytest.mark.parametrize("k", NAMES)
@pytest.mark.parametrize("v", NAMES)
def test_a_pair_of_names_round_trips(k: str, v: str) -> None:
    format = KVFormat.parse(f"{k}/{v}")
    assert (format.k, format.v) == (CODECS[k], CODECS[v])
    assert KVFormat.parse(str(format)) == format


@pytest.mark.parametrize("k", BY_DIGITS)
@pytest.mark.parametrize("v", BY_DIGITS)
def test_a_short_form_is_two_token_codecs_or_bf16_with_edges(k: str, v: str) -> None:
    if k == v == "16":
        return
    format = KVFormat.parse(f"k{k}v{v}")
    assert format == KVFormat.parse(f"{BY_DIGITS[k]}/{BY_DIGITS[v]}+edges")
    assert str(format) == (f"k{k}v{v}" if k != v else f"kv{k}")


@pytest.mark.parametrize(
    ("name", "same", "span"),
    [
        ("kv8", "int8-token+edges", 64), ("kv4", "int4-token+edges", 64), ("k8v4", "int8-token/int4-token+edges", 64),
        ("kv8+edges128", "int8-token+edges128", 128), ("k8v4+edges256", "int8-token/int4-token+edges256", 256),
        ("int8+edges", "int8/int8+edges", 64), ("int8/bf16+edges128", "int8/bf16+edges128", 128),
    ],
)  # fmt: skip
def test_edges_are_named_after_the_codecs_and_short_names_have_them(name: str, same: str, span: int) -> None:
    format = KVFormat.parse(name)
    assert format == KVFormat.parse(same)
    assert format.edges == span
    assert str(format) == name


def test_without_edges_both_codecs_are_named() -> None:
    assert str(KVFormat.parse("int8-token/int4-token")) == "int8-token/int4-token"
    assert KVFormat.parse("int8-token/int4-token").edges == 0


@pytest.mark.parametrize("name", ["bf16+edges", "fp32+edges128", "fp16/bf16+edges"])
def test_raw_formats_have_no_edges(name: str) -> None:
    with pytest.raises(OctavoError, match="where every row is raw there are no edges"):
        KVFormat.parse(name)


def test_pairs_that_have_no_short_form_print_both_names() -> None:
    assert str(KVFormat.parse("int8/int4-token")) == "int8/int4-token"
    assert str(KVFormat.parse("fp16/int8-token")) == "fp16/int8-token"
    assert str(KVFormat.parse("int8-token/int4-token-unrotated")) == "int8-token/int4-token-unrotated"


def test_case_and_spaces_around_a_name_do_not_matter() -> None:
    assert KVFormat.parse("  K8V4\n") == KVFormat.parse("k8v4")
    assert KVFormat.parse("INT8-Token") == KVFormat.parse("int8-token")


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "/", "int8/", "/int8", "int8/int8/int8", "int9", "int8-", "int8-tokens", "int4", "int8 token", "fp4",
        "8", "k8", "kv", "kv16", "k16v16", "kv8+", "kv8+edge", "int8+edges64",
        "k8v", "v8k4", "k8v5", "k32v8", "k8v4v4", "xk8v4", "k8v4/int8", "int8 / int8", "none",
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist_is_an_error_that_lists_those_that_do(name: str) -> None:
    with pytest.raises(OctavoError) as caught:
        KVFormat.parse(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in [*NAMES, "k8v4"])
    assert caught.value.__cause__ is None


def test_raw_codecs_are_found_by_the_name_of_a_torch_dtype() -> None:
    assert {CODECS[short].dtype: short for short in ("bf16", "fp16", "fp32")} == RAW_NAMES


@pytest.mark.parametrize(
    ("name", "dim", "row"),
    [
        ("bf16", 128, 256), ("fp16", 128, 256), ("fp32", 128, 512), ("int8", 128, 128), ("int8-token", 128, 129),
        ("int8-token-unrotated", 128, 129), ("int4-token", 128, 65), ("int4-token-unrotated", 128, 65),
        ("bf16", 65, 130), ("int8", 65, 65), ("int8-token", 65, 66), ("int4-token", 65, 34), ("int4-token", 1, 2),
    ],
)  # fmt: skip
def test_a_row_takes_the_bytes_of_the_table(name: str, dim: int, row: int) -> None:
    assert CODECS[name].row_bytes(dim) == row


@pytest.mark.parametrize("dim", [1, 7, 64, 80, 96, 127, 128, 256])
def test_only_token_codecs_have_a_byte_beside_their_codes(dim: int) -> None:
    for name, codec in CODECS.items():
        extra = 1 if "token" in name else 0
        assert codec.has_token_scale == extra
        assert codec.row_bytes(dim) - codec.code_bytes(dim) == extra


@pytest.mark.parametrize(("heads", "k_dim", "v_dim"), [(1, 64, 64), (8, 128, 128), (3, 80, 96), (4, 24, 12), (5, 7, 3)])
def test_a_token_of_int8_takes_exactly_half_of_bf16(heads: int, k_dim: int, v_dim: int) -> None:
    bf16 = KVFormat.parse("bf16").token_bytes(heads, k_dim, v_dim)
    assert bf16 == 2 * heads * (k_dim + v_dim)
    assert 2 * KVFormat.parse("int8").token_bytes(heads, k_dim, v_dim) == bf16
    assert KVFormat.parse("int8-token").token_bytes(heads, k_dim, v_dim) == heads * (k_dim + v_dim + 2)


def test_the_two_sides_of_a_token_are_counted_with_their_own_codec_and_dim() -> None:
    assert KVFormat.parse("k8v4").token_bytes(2, 24, 13) == 2 * ((24 + 1) + (7 + 1))
    assert KVFormat.parse("k4v8").token_bytes(2, 24, 13) == 2 * ((12 + 1) + (13 + 1))
    assert KVFormat.parse("bf16/int8").token_bytes(3, 10, 20) == 3 * (20 + 20)


@pytest.mark.parametrize(
    ("name", "needs", "takes"),
    [
        ("bf16", False, False), ("fp16", False, False), ("fp32", False, False), ("fp16/bf16", False, False),
        ("int8", True, True), ("int8-token", False, True), ("int4-token", False, True), ("k8v4", False, True),
        ("int8/int4-token", True, True), ("int4-token/int8", True, True), ("bf16/int8", True, True),
        ("k16v8", False, True), ("int8-token/bf16", False, True),
    ],
)  # fmt: skip
def test_a_format_says_whether_it_needs_or_takes_a_calibration(name: str, needs: bool, takes: bool) -> None:
    format = KVFormat.parse(name)
    assert (format.needs_calibration, format.takes_calibration) == (needs, takes)


def test_formats_are_values() -> None:
    assert len({KVFormat.parse(name) for name in ("k8v4", "int8-token/int4-token+edges", "k4v8")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVFormat.parse("int8").k = CODECS["bf16"]  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        CODECS["int8"].bits = 4  # type: ignore[misc]
    assert Codec("static", 8) == CODECS["int8"]


def test_the_examples_in_the_docstrings_hold() -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
