"""The tensors that hold the codes: what goes in comes out, and every byte is accounted for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.cache.layout import SLACK, Layout, RowLayout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.row_store import RowStore
from octavo.cache.store import KVCache, Memory
from octavo.quant.calibration import Calibration, Header
from octavo.quant.codec import Rows, Static, decode, encode, rotate
from octavo.quant.format import CODECS, KVFormat
from tests.conftest import ranging

CPU = torch.device("cpu")
HEADER = Header("f", dataset="none", samples=1, seqlen=1, tokens=1, positions=(0, 0))
ORDERS: list[Any] = ["rows", "tiles"]
TOKEN_NAMES = [name for name in CODECS if "token" in name]


def parse(name: str) -> KVFormat:
    return KVFormat.parse(name)


def calibration(shapes: list[LayerShape], low: float = -4.0, high: float = 4.0) -> Calibration:
    """Ranges that differ by layer, side, head and channel."""

    def side(seed: int, heads: int, dim: int) -> dict[str, Tensor]:
        shift = torch.rand(heads, dim, generator=torch.Generator().manual_seed(seed))
        return ranging(low - shift, high + 2 * shift)

    layers = [
        {"k": side(2 * i, shape.kv_heads, shape.k_dim), "v": side(2 * i + 1, shape.kv_heads, shape.v_dim)}
        for i, shape in enumerate(shapes)
    ]
    return Calibration(HEADER, layers)


def store(
    name: str,
    heads: int = 2,
    dim: int = 6,
    blocks: int = 4,
    size: int = 8,
    static: Static | None = None,
    order: Any = "rows",
    side: Any = "k",
) -> RowStore:
    if name == "int8" and static is None:
        static = Static(torch.zeros(heads, dim), torch.ones(heads, dim) / 16)
    return RowStore(CODECS[name], heads, dim, static, Layout(size, order), side, blocks, CPU)


def read_decoded(rows: RowStore, slots: Tensor) -> Tensor:
    """The values that the given slots stand for, [tokens, heads, dim], through the layout alone."""
    every = torch.arange(len(rows.codes))
    codes = rows.layout.read_rows(rows.codes, every).transpose(0, 1)[slots]
    scales = (
        None if rows.scales is None else rows.scale_layout.read_rows(rows.scales, every).transpose(0, 1)[slots][..., 0]
    )
    return decode(Rows(codes, scales), rows.codec, rows.dim, rows.static)


def tensors_of(cache: KVCache) -> list[Tensor]:
    return [t for store in cache.stores for t in (store.codes, store.scales) if t is not None]


# Layout


def test_the_default_block_has_sixty_four_slots() -> None:
    assert Layout().block_size == 64


def test_memory_starts_as_zeros() -> None:
    memory = RowLayout("rows", 4, 5, torch.bfloat16).allocate(3, 2, CPU)
    assert memory.dtype == torch.bfloat16
    assert memory.numel() == 3 * 2 * 4 * 5
    assert not memory.any()


def test_rows_come_back_from_the_slots_they_were_written_to() -> None:
    layout, generator = RowLayout("rows", 4, 2, torch.float32), torch.Generator().manual_seed(0)
    memory = layout.allocate(5, 3, CPU)
    slots = torch.randperm(20, generator=generator)[:13]
    rows = torch.randn(13, 3, 2, generator=generator)
    layout.write_rows(memory, slots, rows)
    back = layout.read_rows(memory, torch.arange(5))
    assert back.shape == (3, 20, 2)
    assert torch.equal(back.transpose(0, 1)[slots], rows)
    unwritten = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not back[:, unwritten].any()


def test_blocks_are_read_in_the_order_asked_for_and_as_a_copy() -> None:
    layout = RowLayout("rows", 2, 1, torch.float32)
    memory = layout.allocate(4, 1, CPU)
    layout.write_rows(memory, torch.arange(8), torch.arange(8.0).view(8, 1, 1))
    rows = layout.read_rows(memory, torch.tensor([3, 0, 3]))
    assert rows.flatten().tolist() == [6, 7, 0, 1, 6, 7]
    rows.zero_()
    assert layout.read_rows(memory, torch.tensor([3])).flatten().tolist() == [6, 7]


def test_writing_no_rows_changes_nothing() -> None:
    layout = RowLayout("rows", 2, 3, torch.int8)
    memory = layout.allocate(2, 1, CPU)
    layout.write_rows(memory, torch.empty(0, dtype=torch.int64), torch.empty(0, 1, 3, dtype=torch.int8))
    assert not memory.any()


@pytest.mark.parametrize("codec", ["int8", "int4-token", "bf16", "fp32"])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("order", ["tiles", "pages"])
def test_tiles_give_back_the_rows_that_were_written(order: Any, side: Any, codec: str) -> None:
    layout, generator = Layout(8, order).of(side, CODECS[codec], 24), torch.Generator().manual_seed(0)
    dtype = layout.dtype
    memory = layout.allocate(4, 3, CPU)
    slots = torch.randperm(32, generator=generator)[:21]
    rows = torch.randint(0, 256, (21, 3, layout.width), generator=generator).to(torch.uint8)
    rows = rows.view(torch.int8) if dtype == torch.int8 else rows.to(dtype)
    layout.write_rows(memory, slots[:10], rows[:10])
    layout.write_rows(memory, slots[10:], rows[10:])
    back = layout.read_rows(memory, torch.arange(4))
    assert back.dtype == dtype
    assert torch.equal(back.transpose(0, 1)[slots], rows)
    swapped = layout.read_rows(memory, torch.tensor([2, 0]))
    assert torch.equal(swapped, torch.cat([back[:, 16:24], back[:, :8]], 1))
    swapped.zero_()
    assert torch.equal(layout.read_rows(memory, torch.arange(4)), back)


def test_tiles_put_each_code_where_the_kernels_look_for_it() -> None:
    rows = torch.randint(-128, 128, (8, 2, 12), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    k_layout, v_layout = (Layout(8, "tiles").of(side, CODECS["int8"], 12) for side in ("k", "v"))
    raw_layout = Layout(8, "tiles").of("k", CODECS["fp32"], 12)
    k, v, floats = (layout.allocate(1, 2, CPU) for layout in (k_layout, v_layout, raw_layout))
    k_layout.write_rows(k, torch.arange(8), rows)
    v_layout.write_rows(v, torch.arange(8), rows)
    raw_layout.write_rows(floats, torch.arange(8), rows.float())
    assert k.shape == (1, 2, 3, 8, 4)
    assert v.shape == (1, 2, 2, 12, 4)
    assert floats.shape == (1, 2, 12, 8)
    for token in range(8):
        for d in range(12):
            code = rows[token, :, d].tolist()
            assert (k.view(torch.uint8)[0, :, d // 4, token, d % 4].int() - 128).tolist() == code
            assert v[0, :, token // 4, d, token % 4].tolist() == code
            assert floats[0, :, d, token].tolist() == code


@pytest.mark.parametrize("codec", ["int8", "bf16"])
@pytest.mark.parametrize(("side", "width", "room"), [("k", 8, 0), ("v", 8, SLACK), ("v", 40, SLACK), ("v", 64, 0)])
def test_only_rows_of_v_that_are_no_whole_registers_have_room_at_the_end(
    side: Any, width: int, room: int, codec: str
) -> None:
    memory = Layout(8, "tiles").of(side, CODECS[codec], width).allocate(2, 1, CPU)
    assert memory.numel() == 2 * 8 * width
    assert memory.untyped_storage().nbytes() == memory.nbytes + room
    assert not memory.any()


def test_a_layout_of_tiles_differs_by_side_and_one_of_rows_does_not() -> None:
    rows, tiles = ([Layout(16, order).of(side, CODECS["int8"], 64) for side in ("k", "v")] for order in ORDERS)
    assert tiles[0] != tiles[1]
    assert rows[0] == rows[1]


# RowStore


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("dim", "order", "side"), [(6, "rows", "k"), (7, "rows", "v"), (8, "tiles", "k"), (8, "tiles", "v")]
)
def test_a_store_holds_the_codes_of_what_was_written(name: str, dim: int, order: str, side: str) -> None:
    rows, generator = store(name, dim=dim, order=order, side=side), torch.Generator().manual_seed(1)
    slots = torch.randperm(32, generator=generator)[:20]
    x = torch.randn(20, 2, dim, generator=generator)
    rows.write(x[:5], slots[:5])
    rows.write(x[5:], slots[5:])
    expected = decode(encode(x, rows.codec, rows.static), rows.codec, dim, rows.static)
    torch.testing.assert_close(read_decoded(rows, slots), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("dim", "order", "side"), [(6, "rows", "k"), (7, "rows", "v"), (8, "tiles", "k"), (8, "tiles", "v")]
)
def test_read_gives_centered_codes_and_their_scales(name: str, dim: int, order: str, side: str) -> None:
    rows, generator = store(name, dim=dim, order=order, side=side), torch.Generator().manual_seed(2)
    x = torch.randn(32, 2, dim, generator=generator)
    rows.write(x, torch.arange(32))
    blocks = torch.tensor([2, 0])
    codes, scales = rows.read(blocks)
    assert codes.dtype == torch.float32
    assert codes.shape == (2, 16, dim)
    assert (scales is not None) == (name in TOKEN_NAMES)
    y = codes
    if scales is not None:
        assert scales.shape == (2, 16)
        y = y * scales[..., None]
    if rows.codec.rotated:
        y = rotate(y)
    if rows.static is not None:
        y = y * rows.static.c[:, None] + rows.static.mu[:, None]
    expected = decode(encode(x, rows.codec, rows.static), rows.codec, dim, rows.static)
    torch.testing.assert_close(y, torch.cat([expected[16:24], expected[:8]]).transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_a_second_write_to_a_slot_replaces_the_first(name: str) -> None:
    rows = store(name)
    slots = torch.tensor([5, 9])
    rows.write(torch.full((2, 2, 6), 3.0), slots)
    rows.write(torch.full((1, 2, 6), -2.0), slots[1:])
    back = read_decoded(rows, slots)
    torch.testing.assert_close(back, torch.tensor([3.0, -2.0])[:, None, None].expand(2, 2, 6), rtol=0.1, atol=0.1)
    assert (back[0] > 0).all()
    assert (back[1] < 0).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dim", [6, 7, 1, 64])
def test_a_stores_bytes_are_those_of_the_format(name: str, dim: int) -> None:
    rows = store(name, heads=3, dim=dim, blocks=5, size=8)
    assert rows.nbytes == 5 * 8 * 3 * CODECS[name].row_bytes(dim)
    assert rows.codes.nbytes == 5 * 8 * 3 * CODECS[name].code_bytes(dim)
    assert rows.codes.dtype == getattr(torch, CODECS[name].dtype)
    assert (rows.scales is not None) == (name in TOKEN_NAMES)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("with_static", [False, True])
def test_folding_and_unfolding_stand_for_decoding(name: str, with_static: bool) -> None:
    """q·x = fold(q)·y + q·mu, and Σ w x = unfold(Σ w y, Σ w), for every codec with and without a static part."""
    generator = torch.Generator().manual_seed(3)
    static = None
    if name == "int8" or (with_static and name in TOKEN_NAMES):
        static = Static(torch.randn(2, 6, generator=generator), torch.rand(2, 6, generator=generator) / 16 + 0.01)
    rows = store(name, static=static)
    x = torch.randn(8, 2, 6, generator=generator)
    rows.write(x, torch.arange(8))
    codes, scales = rows.read(torch.tensor([0]))  # [2, 8, 6]
    y = codes if scales is None else codes * scales[..., None]
    values = read_decoded(rows, torch.arange(8)).transpose(0, 1)  # [2, 8, 6]
    q = torch.randn(3, 2, 4, 6, generator=generator)  # [tokens, heads, group, dim]
    scores = torch.einsum("thgd,hsd->thgs", rows.fold(q), y)
    if static is not None:
        scores = scores + (q * static.mu[:, None]).sum(-1, keepdim=True)
    torch.testing.assert_close(scores, torch.einsum("thgd,hsd->thgs", q, values), rtol=1e-4, atol=1e-4)
    weights = torch.rand(3, 2, 4, 8, generator=generator)
    out = rows.unfold(torch.einsum("thgs,hsd->thgd", weights, y), weights.sum(-1, keepdim=True))
    torch.testing.assert_close(out, torch.einsum("thgs,hsd->thgd", weights, values), rtol=1e-4, atol=1e-4)


def test_saturation_is_counted_over_all_writes() -> None:
    rows = store("int8", static=Static(torch.zeros(2, 6), torch.ones(2, 6)))
    x = torch.zeros(4, 2, 6)
    x[0, 0, 0], x[3, 1, 5], x[2, 0, 2] = 129.0, -500.0, 128.0  # the last lies within a step of the range
    rows.write(x[:2], torch.tensor([0, 1]))
    rows.write(x[2:], torch.tensor([2, 3]))
    assert rows.saturated.item() == 2
    assert rows.written == 48


# KVCache


def test_a_cache_takes_exactly_what_its_format_says() -> None:
    shapes = [LayerShape(2, 8, 8), LayerShape(3, 16, 5)]
    for name in [*CODECS, "int8-token/int4-token", "int4-token/int8-token", "bf16/int8-token", "int8/int4-token"]:
        cache = KVCache(plan_layers(shapes, parse(name), calibration(shapes)), 6, Layout(16))
        per_token = parse(name).token_bytes(2, 8, 8) + parse(name).token_bytes(3, 16, 5)
        assert cache.nbytes == 6 * 16 * per_token == sum(t.nbytes for t in tensors_of(cache))


@pytest.mark.parametrize("name", [*CODECS, "int8-token/int4-token"])
def test_tiles_take_the_same_bytes_a_token_and_a_little_at_the_end(name: str) -> None:
    shapes = [LayerShape(2, 16, 8)]
    rows, tiles = (
        KVCache(plan_layers(shapes, parse(name), calibration(shapes)), 6, Layout(16, order)) for order in ORDERS
    )
    assert tiles.nbytes == rows.nbytes + SLACK  # of V, whose 8 channels are half a register
    assert tiles.memory() == replace(rows.memory(), padding=SLACK)


def test_int8_takes_exactly_half_of_bf16() -> None:
    shapes = [LayerShape(2, 64, 64)] * 3
    int8 = KVCache(plan_layers(shapes, parse("int8"), calibration=calibration(shapes)), 4)
    assert 2 * int8.nbytes == KVCache(plan_layers(shapes, parse("bf16")), 4).nbytes


@pytest.mark.parametrize("name", [*CODECS, "int8-token/int4-token", "int8/int4-token-unrotated"])
@pytest.mark.parametrize("dim", [8, 7])
def test_the_parts_of_memory_add_up_to_the_tensors(name: str, dim: int) -> None:
    shapes = [LayerShape(2, dim, dim + 2), LayerShape(3, 16, dim)]
    cache = KVCache(plan_layers(shapes, parse(name), calibration(shapes)), 6, Layout(16))
    memory = cache.memory()
    tensors = tensors_of(cache)
    assert memory.codes + memory.padding + memory.scales == sum(t.nbytes for t in tensors) == cache.nbytes
    assert memory.scales == sum(s.scales.nbytes for s in cache.stores if s.scales is not None)
    held = [t for s in cache.stores if s.static for t in (s.static.mu, s.static.c, s.static.reciprocal)]
    assert memory.static == sum(t.nbytes for t in held)
    assert memory.total == sum(t.nbytes for t in [*tensors, *held])


def test_memory_by_hand() -> None:
    shapes = [LayerShape(2, 5, 4)]
    cache = KVCache(plan_layers(shapes, parse("int4-token")), 3, Layout(8))
    rows = 3 * 8 * 2
    assert cache.memory() == Memory(codes=rows * 9 // 2, scales=rows * 2, padding=rows // 2, static=0)
    calibrated = KVCache(plan_layers(shapes, parse("int4-token"), calibration(shapes)), 3, Layout(8))
    assert calibrated.memory().static == 2 * (5 + 4) * 4 * 3  # mu, c and 1/c in float32
    raw = KVCache(plan_layers(shapes, parse("fp16"), calibration(shapes)), 3, Layout(8))
    assert raw.memory() == Memory(codes=rows * 9 * 2, scales=0, padding=0, static=0)


def test_a_layer_that_shares_another_owns_nothing() -> None:
    shapes = [LayerShape(2, 8, 8), LayerShape(2, 8, 8), LayerShape(2, 8, 8, shares=0), LayerShape(2, 8, 8, shares=1)]
    cache = KVCache(plan_layers(shapes, parse("int8-token")), 4, Layout(8))
    assert cache.layers[2] is cache.layers[0]
    assert cache.layers[3] is cache.layers[1]
    assert len(cache.stores) == 4
    assert len({id(store) for store in cache.stores}) == 4
    assert cache.nbytes == KVCache(plan_layers(shapes[:2], parse("int8-token")), 4, Layout(8)).nbytes
    assert cache.memory() == KVCache(plan_layers(shapes[:2], parse("int8-token")), 4, Layout(8)).memory()
    assert [shape.token_bytes(parse("int8-token")) for shape in shapes] == [36, 36, 0, 0]


def test_each_layer_can_have_its_own_format() -> None:
    shapes = [LayerShape(1, 8, 8), LayerShape(2, 6, 10), LayerShape(1, 8, 8)]
    formats = [parse("bf16"), parse("int8-token/int4-token"), parse("int8")]
    cache = KVCache(plan_layers(shapes, formats, calibration(shapes)), 2, Layout(4))
    assert [(str(layer.k.codec), str(layer.v.codec)) for layer in cache.layers] == [
        ("bf16", "bf16"), ("int8-token", "int4-token"), ("int8", "int8"),
    ]  # fmt: skip
    assert [(layer.k.dim, layer.v.dim) for layer in cache.layers] == [(8, 8), (6, 10), (8, 8)]
    assert cache.layers[0].k.static is None
    assert cache.layers[1].k.static is not None
    assert cache.size.block == 4 * (32 + 2 * (7 + 6) + 16)
    with pytest.raises(ValueError, match="2 formats for 3 layers"):
        KVCache(plan_layers(shapes, formats[:2], calibration(shapes)), 2, Layout(4))


@pytest.mark.parametrize("name", ["int8", "int8/bf16", "int4-token/int8"])
def test_a_static_format_without_a_calibration_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"int8.*calibration"):
        KVCache(plan_layers([LayerShape(1, 8, 8)], parse(name)), 2)


def test_layers_and_sides_take_their_own_static_part() -> None:
    shapes = [LayerShape(2, 8, 8), LayerShape(2, 8, 8)]
    made = calibration(shapes)
    cache = KVCache(plan_layers(shapes, parse("int8"), made.choosing("head", 2.0)), 2, Layout(4))
    for i, layer in enumerate(cache.layers):
        for side, rows in (("k", layer.k), ("v", layer.v)):
            expected = made.choosing("head", 2.0).static(i, side, parse("int8").k)
            assert rows.static is not None
            assert torch.equal(rows.static.mu, expected.mu)
            assert torch.equal(rows.static.c, expected.c)
    default = KVCache(plan_layers(shapes, parse("int8"), made), 2, Layout(4)).layers[0].k.static
    assert default is not None
    assert torch.equal(default.c, made.choosing("channel", 1.4).static(0, "k", parse("int8").k).c)


def test_saturation_is_a_share_of_each_layer_and_side() -> None:
    shapes = [LayerShape(2, 4, 8), LayerShape(2, 4, 8), LayerShape(2, 4, 8, shares=1), LayerShape(2, 4, 8)]
    formats = [parse("int8"), parse("int8/int8-token"), parse("int8"), parse("bf16")]
    cache = KVCache(plan_layers(shapes, formats, calibration(shapes)), 2, Layout(4))
    assert cache.saturation() == [(0, 0)] * 4
    k, v = torch.zeros(5, 2, 4), torch.zeros(5, 2, 8)
    k[0, 0, :2] = 1e3
    v[4] = -1e3
    slots = torch.tensor([0, 1, 2, 6, 7])
    cache.layers[0].write(k, v, slots)
    assert cache.saturation() == [(2 / 40, 16 / 80), (0, 0), (0, 0), (0, 0)]
    cache.layers[0].write(torch.zeros_like(k), torch.zeros_like(v), slots)
    cache.layers[1].write(k, torch.zeros_like(v), slots)
    cache.layers[3].write(1e6 * k, 1e6 * v, slots)
    assert cache.saturation() == [(2 / 80, 16 / 160), (2 / 40, 0), (2 / 40, 0), (0, 0)]


def test_a_layer_writes_k_and_v_to_their_own_sides() -> None:
    cache = KVCache(plan_layers([LayerShape(1, 2, 3)], parse("fp32")), 2, Layout(2))
    k, v = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0, 5.0]]])
    cache.layers[0].write(k, v, torch.tensor([3]))
    assert torch.equal(read_decoded(cache.layers[0].k, torch.tensor([3])), k)
    assert torch.equal(read_decoded(cache.layers[0].v, torch.tensor([3])), v)
    assert not read_decoded(cache.layers[0].k, torch.tensor([0, 1, 2])).any()


def test_rows_of_any_strides_and_dtype_can_be_written() -> None:
    """The model hands its rows over as a transposed view in its own dtype."""
    shapes = [LayerShape(2, 6, 6)]
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(4)).bfloat16()
    for name in [*CODECS, "int8-token/int4-token"]:
        cache = KVCache(plan_layers(shapes, parse(name), calibration(shapes)), 2, Layout(8))
        view = x.transpose(0, 1)
        cache.layers[0].write(view, view, torch.arange(9))
        for rows in cache.stores:
            plain = decode(encode(view.float().contiguous(), rows.codec, rows.static), rows.codec, 6, rows.static)
            error = (read_decoded(rows, torch.arange(9)) - plain).abs().max()
            assert math.isfinite(error)
            assert error < 1e-5
