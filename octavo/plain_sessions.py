"""Saved sessions as plain numbers and back, for who wants to look at K and V or change them.

A plain file is safetensors, of version 1:

    layers.{i}.k, layers.{i}.v     float32 [KV heads, tokens, dim]: what attention reads of each row, after RoPE; of
                                   each layer that has a cache of its own
    states.{i}.{kind}.{j}          the states at the end of these tokens, of each layer that keeps some, as they are
    metadata                       format "octavo kv rows", version, tokens (a JSON list of ids), kv (its format), rows:
                                   how many of the tokens have rows; layers with a sliding window have the last ones

Rows are decoded; with edges those of page 0 are the raw ones. Import encodes the rows: those that were not changed get
their codes and scales again, to the last bit and in every format, so that a session which is exported, imported and
exported once more has the same rows.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.artefact import replacing
from octavo.cache import session
from octavo.cache.plan import Side
from octavo.cache.session import FIRST, STATES, Codes, SavedSession
from octavo.cache.store import KVCache
from octavo.errors import OctavoError, one_line
from octavo.llm import LLM
from octavo.quant.codec import Rows, Static, decode, encode, encode_decoded
from octavo.quant.format import Codec

FORMAT = "octavo kv rows"
VERSION = "1"


def export_session(llm: LLM, saved: str | Path, plain: str | Path) -> int:
    """Write a saved session of this model and cache format as plain rows; returns how many tokens they are of.

    Raises OctavoError for a file of another model or format.
    """
    file = SavedSession.open(Path(saved))
    file.check(llm.session_identity, llm.model.bound.vocab_size)
    codes = file.codes(llm.cache)
    size, count = llm.cache.layout.block_size, session.rows(codes)
    rows = {}
    for side in _sides(llm.cache):
        coded = Rows(codes[f"{side.name}.codes"].transpose(0, 1), _transposed(codes.get(f"{side.name}.scales")))
        x = decode(coded, side.codec, side.dim, side.static).transpose(0, 1)
        if side.raw is not None and x.shape[1] == count:  # else page 0 is behind the window
            x[:, :size] = codes[f"{side.first}.codes"].float()
        rows[side.name] = x.contiguous()
    rows |= {name: codes[name] for name in codes if name.startswith(STATES)}
    about = {"format": FORMAT, "version": VERSION, "tokens": json.dumps(file.tokens), "kv": str(llm.format),
             "rows": str(count)}  # fmt: skip
    with replacing(Path(plain), private=True) as part:
        save_file(rows, part, about)
    return count


def format_of(plain: str | Path) -> str:
    """The format of the session that a plain file was made of."""
    with _opened(Path(plain)) as (_, about):
        return about["kv"]


def import_session(llm: LLM, plain: str | Path, saved: str | Path) -> int:
    """Make a session that `llm.restore` takes of plain rows; returns how many tokens it has the codes of: whole blocks.

    Raises OctavoError, and writes nothing, for rows of another geometry, rows that are not finite, and other files.
    """
    path = Path(plain)
    tokens, count, rows = _read(path, llm)
    size = llm.cache.layout.block_size
    whole = count // size * size
    if not whole:
        raise OctavoError(f"{path}: {count} tokens are fewer than a block of {size}: there is nothing to keep")
    codes: Codes = {session.ROWS: torch.tensor([whole])}
    shapes = session.kinds(llm.cache, whole)
    codes |= {name: rows[name] for name in rows if name.startswith(STATES)}
    if whole < count and len(codes) > 1:
        raise OctavoError(f"{path}: its states are those of {count} tokens, which are no whole blocks of {size}")
    for side in _sides(llm.cache):
        name, raw = side.name, side.raw
        end = rows[name].shape[1] - (count - whole)
        held = shapes[f"{name}.codes"][1][1]
        if end < held:
            raise OctavoError(f"{path}: {name} has {rows[name].shape[1]} rows; its layer sees the last {held}")
        x = rows[name][:, end - held : end].transpose(0, 1)
        coded = encode_decoded(x, side.codec, side.static)
        if raw is not None and held == whole:  # page 0 was never decoded
            page = encode(x[:size], side.codec, side.static)
            coded.codes[:size] = page.codes
            if coded.scales is not None and page.scales is not None:
                coded.scales[:size] = page.scales
        codes[f"{name}.codes"] = coded.codes.transpose(0, 1).contiguous()
        if coded.scales is not None:
            codes[f"{name}.scales"] = coded.scales.transpose(0, 1).contiguous()
        if raw is not None:
            first = x[:size] if held == whole else torch.zeros(size, side.heads, side.dim)  # behind the window
            codes[f"{side.first}.codes"] = encode(first, raw).codes.transpose(0, 1).contiguous()
    session.save(Path(saved), tokens, codes, llm.session_identity)
    return session.rows(codes)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file and its metadata. Raises OctavoError for what is none of this format and version, or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("version") != VERSION or "kv" not in about:
                raise OctavoError(f"{path}: is no file of {FORMAT}, version {VERSION}")
            yield file, about
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise OctavoError(f"{path}: cannot be read: {one_line(error)}") from None


def _read(path: Path, llm: LLM) -> tuple[list[int], int, dict[str, Tensor]]:
    """Token ids, how many of them have rows, and these."""
    with _opened(path) as (file, about):
        tokens, count = json.loads(about["tokens"]), int(about["rows"])
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    vocabulary = llm.model.bound.vocab_size
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < vocabulary for t in tokens):
        raise OctavoError(f"{path}: its tokens are not ids of this model's vocabulary of {vocabulary}")
    expected = {side.name: (side.heads, side.dim) for side in _sides(llm.cache)}
    states = {name: kind for name, kind in session.kinds(llm.cache, count).items() if name.startswith(STATES)}
    if not 0 <= count <= len(tokens):
        raise OctavoError(f"{path}: it has {len(tokens)} tokens, and rows of {count}")
    if strange := sorted(rows.keys() ^ (expected.keys() | states.keys())):
        raise OctavoError(f"{path}: the tensor {strange[0]} is {'unknown' if strange[0] in rows else 'missing'}")
    for name, (heads, dim) in expected.items():
        own = rows[name].shape
        if len(own) != 3 or (own[0], own[2]) != (heads, dim) or own[1] > count:
            raise OctavoError(
                f"{path}: {name} is of shape {list(rows[name].shape)}; this model has {[heads, '…', dim]}"
            )
    for name, (dtype, shape) in states.items():
        if (rows[name].dtype, tuple(rows[name].shape)) != (dtype, shape):
            raise OctavoError(f"{path}: {name} does not have the shape or type of this model's states")
    if strange := [name for name, x in rows.items() if not bool(x.isfinite().all())]:
        raise OctavoError(f"{path}: {strange[0]} holds values that are not finite")
    return tokens, count, rows


@dataclass(frozen=True)
class _Side:
    """K or V of a layer that has a cache of its own, with all of its heads."""

    layer: int
    side: Side
    heads: int
    dim: int
    codec: Codec
    static: Static | None
    raw: Codec | None  # of the rows of page 0, where there are edges

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.side}"

    @property
    def first(self) -> str:
        return f"layers.{self.layer}{FIRST}{self.side}"


def _sides(cache: KVCache) -> Iterator[_Side]:
    for i, _ in cache.owners:
        plan = cache.whole[i]
        raw = plan.shape.raw_codec if plan.format.edges else None
        for side, codec, dim, static in plan.sides:
            yield _Side(i, side, plan.shape.kv_heads, dim, codec, static, raw)


def _transposed(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.transpose(0, 1)
