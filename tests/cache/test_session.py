"""Saved sessions: what comes back is what was there, bit for bit, or it is refused, or computed again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import artefact
from octavo.artefact import Damaged
from octavo.cache import session
from octavo.cache.blocks import BlockPool
from octavo.cache.layout import Layout
from octavo.cache.plan import LayerShape, plan_layers
from octavo.cache.pool import CachePool
from octavo.cache.session import Codes, Identity, SavedSession
from octavo.cache.store import KVCache
from octavo.errors import OctavoError
from octavo.quant.format import KVFormat

SHAPES = [LayerShape(2, 16, 16), LayerShape(1, 32, 8), LayerShape(2, 16, 16, shares=0), LayerShape(2, 8, 6)]
MIXED = ["int8-token", "int4-token", "int8-token", "bf16"]
TOKENS = [(7 * i) % 50 for i in range(45)]  # five blocks of eight and five tokens
IDENTITY = Identity("sha256:1", "float32", [[2, 16, 16]], ["int8-token"], "0")


def cache(order: Any = "rows", blocks: int = 12, formats: list[str] | str = MIXED) -> tuple[KVCache, CachePool]:
    names = [formats] * len(SHAPES) if isinstance(formats, str) else formats
    made = KVCache(plan_layers(SHAPES, [KVFormat.parse(name) for name in names]), blocks, Layout(8, order))
    return made, CachePool([BlockPool(blocks, 8)])


def fill(kv: KVCache, pool: CachePool, tokens: list[int] = TOKENS, seed: int = 0) -> None:
    """As a sequence does that computes all but its last token and ends."""
    generator = torch.Generator().manual_seed(seed)
    [own] = pool.groups
    table = [own.take() for _ in range(pool.blocks_for(len(tokens)))]
    table.reverse()  # in no order of theirs
    places = torch.arange(len(tokens) - 1)
    slots = torch.tensor(table)[places // 8] * 8 + places % 8
    for store in kv.stores:
        store.write(torch.randn(len(slots), store.heads, store.dim, generator=generator), slots)
    parent = None
    for i in range(pool.prefix_blocks(tokens)):
        parent = own.seal(table[i], parent, tokens[8 * i : 8 * i + 8])
    own.release(table)
    own.check()


def read(kv: KVCache, pool: CachePool, tokens: list[int]) -> Codes:
    return session.to_rows(kv, session.copy_prefix(kv, pool, tokens))


def write(kv: KVCache, pool: CachePool, tokens: list[int], codes: Codes) -> None:
    session.paste_prefix(kv, pool, tokens, session.to_blocks(kv, codes))


def cut(codes: Codes, rows: int) -> Codes:
    """The first rows of a session."""
    return {name: torch.tensor([rows]) if name == "rows" else x[:, :rows] for name, x in codes.items()}


def equal(a: Codes, b: Codes) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- in and out of the cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restored", ["rows", "tiles"])
@pytest.mark.parametrize("saved", ["rows", "tiles"])
def test_codes_come_back_bit_for_bit_under_either_layout(saved: Any, restored: Any, tmp_path: Path):
    """Several formats in one cache, a layer that shares another's, odd sizes of rows."""
    kv, pool = cache(saved)
    fill(kv, pool)
    codes = read(kv, pool, TOKENS)
    assert {name for name in codes if name.startswith("layers.2")} == set()
    assert codes["layers.0.k.codes"].shape == (2, 40, 16)
    assert codes["layers.0.k.scales"].shape == (2, 40)
    assert codes["layers.1.v.codes"].shape == (1, 40, 4)  # two codes a byte
    assert codes["layers.3.k.codes"].dtype == torch.bfloat16
    session.save(tmp_path / "s", TOKENS, codes, IDENTITY)

    other, there = cache(restored)
    other_tokens = list(range(50, 90))
    fill(other, there, other_tokens, seed=1)
    before = read(other, there, other_tokens)
    write(other, there, TOKENS, SavedSession.open(tmp_path / "s").codes(other))
    there.groups[0].check()
    assert not there.groups[0].used
    assert equal(read(other, there, TOKENS), codes)
    assert equal(read(other, there, other_tokens), before), "another conversation was written over"


def test_what_is_cached_already_is_kept_and_only_the_rest_written():
    kv, pool = cache()
    fill(kv, pool)
    codes = read(kv, pool, TOKENS)
    other, there = cache()
    fill(other, there, TOKENS[:20], seed=1)
    own = read(other, there, TOKENS)
    write(other, there, TOKENS, codes)
    now = read(other, there, TOKENS)
    assert equal(cut(now, 16), own)
    assert all(torch.equal(x[:, 16:], codes[name][:, 16:]) for name, x in now.items() if name != "rows")


def test_a_cache_that_is_too_small_takes_the_beginning():
    kv, pool = cache()
    fill(kv, pool)
    codes = read(kv, pool, TOKENS)
    other, there = cache(blocks=4)
    held = there.groups[0].take()
    write(other, there, TOKENS, codes)
    there.groups[0].check()
    assert len(there.find(TOKENS)) == 3
    assert equal(read(other, there, TOKENS), cut(codes, 24))
    there.groups[0].release([held])


def test_of_a_cold_conversation_nothing_is_read_and_nothing_written(tmp_path: Path):
    kv, pool = cache("tiles")
    codes = read(kv, pool, TOKENS)
    assert {rows.shape[1] for name, rows in codes.items() if name != "rows"} == {0}
    session.save(tmp_path / "s", TOKENS, codes, IDENTITY)
    write(kv, pool, TOKENS, SavedSession.open(tmp_path / "s").codes(kv))
    assert not pool.find(TOKENS)


def test_blocks_of_another_size_take_the_same_rows():
    kv, pool = cache()
    fill(kv, pool)
    codes = read(kv, pool, TOKENS)
    other, there = (
        KVCache(plan_layers(SHAPES, [KVFormat.parse(name) for name in MIXED]), 4, Layout(16)),
        CachePool([BlockPool(4, 16)]),
    )
    write(other, there, TOKENS, codes)
    assert equal(read(other, there, TOKENS), cut(codes, 32))


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    kv, pool = cache()
    fill(kv, pool)
    session.save(tmp_path / "s", TOKENS, read(kv, pool, TOKENS), IDENTITY, {"title": "Ünï"})
    return tmp_path / "s"


def outcome(path: Path) -> str:
    """What reading the file comes to: the header refused, the codes, or all of it as written."""
    try:
        saved = SavedSession.open(path)
    except Damaged:
        return "refused"
    assert saved.header == session.Header(session.VERSION, TOKENS, IDENTITY, {"title": "Ünï"})
    try:
        saved.codes(cache()[0])
    except Damaged:
        return "damaged"
    return "whole"


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_file_is_written_whole_and_is_its_owners_alone(file: Path):
    assert outcome(file) == "whole"
    assert [one.name for one in file.parent.iterdir()] == ["s"]
    assert file.stat().st_mode & 0o077 == 0


def test_an_incomplete_file_is_refused_wherever_it_ends(file: Path):
    whole = file.read_bytes()
    header = header_size(whole)
    for length in (0, 1, 7, 8, 9, header // 2, header - 99):
        file.write_bytes(whole[:length])
        assert outcome(file) == "refused", length
    for length in (header - 1, header, header + 1, (header + len(whole)) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert outcome(file) == "damaged", length
    file.write_bytes(whole + b"\0")
    assert outcome(file) == "damaged"


def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(file: Path):
    saved = SavedSession.open(file)
    file.unlink()
    for read in (lambda: saved.codes(cache()[0]), lambda: SavedSession.open(file)):
        with pytest.raises(OctavoError, match="No such file") as raised:
            read()
        assert not isinstance(raised.value, Damaged)


def test_a_tensor_exchanged_for_another_of_its_shape_is_seen(file: Path):
    from safetensors.torch import load_file, save_file

    saved, tensors = SavedSession.open(file), load_file(file)
    metadata = json.loads(file.read_bytes()[8 : header_size(file.read_bytes())])["__metadata__"]
    tensors["layers.0.k.codes"], tensors["layers.0.v.codes"] = tensors["layers.0.v.codes"], tensors["layers.0.k.codes"]
    save_file(tensors, file, metadata=metadata)
    assert SavedSession.open(file).header == saved.header
    assert outcome(file) == "damaged"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "sha256:2"}, r"other weights \(sha256:1…\) than these \(sha256:2…\)"),
        ({"formats": ["int4-token"]}, "holds int8-token codes, and this cache int4-token"),
        ({"calibration": "1"}, "another calibration, granularity or headroom"),
        ({"arithmetic": "bfloat16"}, "computed with float32, and this model runs with bfloat16"),
    ],
)
def test_codes_that_mean_something_else_are_refused(change: dict[str, Any], reason: str, file: Path):
    saved = SavedSession.open(file)
    saved.check(IDENTITY, 50)
    with pytest.raises(OctavoError, match=reason):
        saved.check(replace(IDENTITY, **change), 50)


def test_an_old_file_stays_where_the_new_one_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch):
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(OctavoError, match="cannot be written: No space left on device"):
        session.save(file, TOKENS, {}, IDENTITY)
    assert file.read_bytes() == before
    assert [one.name for one in file.parent.iterdir()] == ["s"]


def test_tokens_outside_the_vocabulary_are_refused(file: Path):
    with pytest.raises(OctavoError, match="token 49 is not in the model's vocabulary of 49"):
        SavedSession.open(file).check(IDENTITY, 49)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda codes: {"layers.9.k.codes": codes["layers.0.k.codes"].clone()}, "layers.9.k.codes is unknown"),
        (lambda codes: {"layers.0.k.codes": codes["layers.0.k.codes"][:1]}, "layers.0.k.codes does not have the shape"),
        (lambda codes: {"layers.0.k.codes": codes["layers.0.k.codes"][..., :8]}, "does not have the shape"),
        (lambda codes: {"layers.0.k.codes": codes["layers.0.k.codes"].float()}, "shape or type"),
        (lambda codes: {"layers.0.k.scales": codes["layers.0.k.scales"][None]}, "shape or type"),
        (lambda codes: {"layers.3.v.codes": codes["layers.3.v.codes"] * float("nan")}, "not finite"),
        (lambda codes: {"layers.0.k.codes": torch.cat([codes["layers.0.k.codes"]] * 2, 1)}, "does not have the shape"),
        (lambda _: {"rows": torch.tensor([80])}, "of how many of its tokens"),
        (lambda _: {"rows": torch.tensor([-8])}, "of how many of its tokens"),
        (lambda _: {"rows": torch.tensor([40.0])}, "of how many of its tokens"),
        (lambda _: {"rows": torch.tensor([32])}, "does not have the shape"),
    ],
)
def test_rows_that_this_cache_could_not_have_written_are_refused(change: Any, reason: str, tmp_path: Path):
    """Their checksums are right: somebody made the file."""
    kv, pool = cache()
    fill(kv, pool)
    codes = read(kv, pool, TOKENS)
    made = {name: rows.contiguous() for name, rows in {**codes, **change(codes)}.items()}
    session.save(tmp_path / "s", TOKENS, made, IDENTITY)
    with pytest.raises(Damaged, match=reason):
        SavedSession.open(tmp_path / "s").codes(kv)


def test_missing_rows_are_refused(tmp_path: Path):
    kv, pool = cache()
    fill(kv, pool)
    codes = read(kv, pool, TOKENS)
    del codes["layers.1.v.scales"]
    session.save(tmp_path / "s", TOKENS, codes, IDENTITY)
    with pytest.raises(Damaged, match="scales is missing"):
        SavedSession.open(tmp_path / "s").codes(kv)
