"""Saved sessions as plain numbers and back, for who wants to look at K and V or change them.

A plain file is safetensors, of version 1:

    layers.{i}.k, layers.{i}.v     float32 [KV heads, tokens, dim]: what attention reads of each row, after RoPE; of
                                   each layer that has a cache of its own
    metadata                       format "octavo kv rows", version, tokens (a JSON list of ids), kv (its format)

Rows are decoded; with edges those of page 0 are the raw ones. Import encodes the rows as if the model had computed
them. Rows of 8-bit formats that were not changed get their old codes again. Those of 4 bits keep their codes and may
get a smaller scale, for their largest value is known to half a step alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.artefact import replacing
from octavo.cache import session
from octavo.cache.session import FIRST, Codes, SavedSession
from octavo.cache.store import KVCache, RowStore
from octavo.errors import OctavoError, one_line
from octavo.llm import LLM
from octavo.quant.codec import Rows, decode, encode

FORMAT = "octavo kv rows"
VERSION = "1"


def export_session(llm: LLM, saved: str | Path, plain: str | Path) -> int:
    """Write a saved session of this model and cache format as plain rows; returns how many tokens they are of."""
    file = SavedSession.open(Path(saved))
    file.check(llm.session_identity, llm.model.bound.vocab_size)
    codes = file.codes(llm.cache)
    size = llm.cache.layout.block_size
    rows = {}
    for name, store, raw in _sides(llm.cache):
        coded = Rows(codes[f"{name}.codes"].transpose(0, 1), _transposed(codes.get(f"{name}.scales")))
        x = decode(coded, store.codec, store.dim, store.static).transpose(0, 1)
        if raw is not None:
            x[:, :size] = codes[f"{_first(name)}.codes"].float()
        rows[name] = x.contiguous()
    about = {"format": FORMAT, "version": VERSION, "tokens": json.dumps(file.tokens), "kv": str(llm.format)}
    with replacing(Path(plain), private=True) as part:
        save_file(rows, part, about)
    return session.rows(codes)


def import_session(llm: LLM, plain: str | Path, saved: str | Path) -> int:
    """Make a session that `llm.restore` takes of plain rows; returns how many tokens it has the codes of: whole blocks.

    Raises OctavoError, and writes nothing, for rows of another geometry, rows that are not finite, and other files.
    """
    path = Path(plain)
    tokens, rows = _read(path, llm)
    size = llm.cache.layout.block_size
    whole = min(len(tokens), rows["layers.0.k"].shape[1]) // size * size
    if not whole:
        raise OctavoError(f"{path}: {len(tokens)} tokens are fewer than a block of {size}: there is nothing to keep")
    codes: Codes = {}
    for name, store, raw in _sides(llm.cache):
        x = rows[name][:, :whole].transpose(0, 1)
        coded = encode(x, store.codec, store.static)
        codes[f"{name}.codes"] = coded.codes.transpose(0, 1).contiguous()
        if coded.scales is not None:
            codes[f"{name}.scales"] = coded.scales.transpose(0, 1).contiguous()
        if raw is not None:
            codes[f"{_first(name)}.codes"] = encode(x[:size], raw.codec).codes.transpose(0, 1).contiguous()
    session.save(Path(saved), tokens, codes, llm.session_identity)
    return session.rows(codes)


def _read(path: Path, llm: LLM) -> tuple[list[int], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("version") != VERSION:
                raise OctavoError(f"{path}: is no file of {FORMAT}, version {VERSION}")
            tokens = json.loads(about["tokens"])
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise OctavoError(f"{path}: cannot be read: {one_line(error)}") from None
    vocabulary = llm.model.bound.vocab_size
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < vocabulary for t in tokens):
        raise OctavoError(f"{path}: its tokens are not ids of this model's vocabulary of {vocabulary}")
    expected = {name: (store.heads, store.dim) for name, store, _ in _sides(llm.cache)}
    if strange := sorted(rows.keys() ^ expected.keys()):
        raise OctavoError(f"{path}: the rows {strange[0]} are {'missing' if strange[0] in expected else 'unknown'}")
    for name, (heads, dim) in expected.items():
        count = rows[name].shape[1] if rows[name].dim() == 3 else -1
        if rows[name].shape != (heads, count, dim) or count != rows["layers.0.k"].shape[1]:
            raise OctavoError(
                f"{path}: {name} is of shape {list(rows[name].shape)}; this model has {[heads, '…', dim]}"
            )
        if not bool(rows[name].isfinite().all()):
            raise OctavoError(f"{path}: {name} holds values that are not finite")
    return tokens, rows


def _sides(cache: KVCache) -> Iterator[tuple[str, RowStore, RowStore | None]]:
    """Every store by its name in both files, with that of its raw rows where there are edges."""
    for i, layer in cache.owners:
        raw = layer.raw or (None, None)
        yield f"layers.{i}.k", layer.k, raw[0]
        yield f"layers.{i}.v", layer.v, raw[1]


def _first(name: str) -> str:
    """layers.0.k → layers.0.first.k"""
    layer, _, side = name.rpartition(".")
    return f"{layer}{FIRST}{side}"


def _transposed(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.transpose(0, 1)
