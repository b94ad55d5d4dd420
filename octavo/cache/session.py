"""A session in a file: the tokens of a conversation and the codes of its K and V, just as they lay in the cache.

One safetensors file. Its tensors are the rows of whole blocks, `layers.{i}.{k,v}.codes` [heads, tokens, width] and, in
token formats, `….scales` [heads, tokens], in no layout of a device's or kernel's: what one wrote another reads. Its
JSON header holds the tokens, what the codes mean, and a checksum of every tensor and of itself. It comes first in the
file, so that of a torn file the tokens are left, from which codes can be computed again; damaged ones are never used.

The last, partly filled block is left out: its tokens, fewer than a block has, are computed again with what follows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.cache.blocks import BlockPool
from octavo.cache.layout import RowLayout
from octavo.cache.plan import CPU
from octavo.cache.store import KVCache, RowStore
from octavo.errors import OctavoError

VERSION = 1
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
PART = ".part"  # how the name of what is not yet whole ends

Codes = dict[str, Tensor]  # rows, by the names above
Copies = list[tuple[Tensor, Tensor | None]]  # codes and scales of some blocks of every store, in its own layout


class Damaged(OctavoError):
    """A file is not what was written."""


@dataclass(frozen=True)
class Identity:
    """What codes mean. They can be read again only where all of it is equal."""

    model: str  # fingerprint of the weights
    arithmetic: str  # dtype and rotary frequencies that K and V were computed with
    shapes: list[list[int]]  # KV heads, K dim and V dim of each layer that has a cache of its own
    formats: list[str]  # of each such layer
    calibration: str  # digest of mu and c of every layer

    @classmethod
    def of(cls, cache: KVCache, model: str, arithmetic: str) -> Identity:
        own = [plan for plan in cache.plans if plan.shape.shares is None]
        digest = sha256()
        for store in cache.stores:
            for part in (store.static.mu, store.static.c) if store.static is not None else ():
                digest.update(_bytes(part.cpu()))
        return cls(
            model,
            arithmetic,
            [[plan.shape.kv_heads, plan.shape.k_dim, plan.shape.v_dim] for plan in own],
            [str(plan.format) for plan in own],
            digest.hexdigest()[:32],
        )

    @property
    def format(self) -> str:
        """The formats' name, for people."""
        return " and ".join(dict.fromkeys(self.formats))


@dataclass(frozen=True)
class SavedSession:
    """A session file, of which the header has been read."""

    path: Path
    tokens: list[int]  # of the whole conversation
    identity: Identity
    about: dict[str, Any] = field(repr=False)  # what its owner keeps beside it
    checksums: dict[str, str] = field(repr=False)  # of each tensor

    @classmethod
    def open(cls, path: Path) -> SavedSession:
        """Read the header; raises Damaged where there is none, or an altered one, and OctavoError where the file cannot
        be read."""
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                text = file.read(size) if size <= LARGEST_HEADER else b""
        except OSError as error:
            raise OctavoError(f"{path} cannot be read: {error.strerror}") from None
        try:
            metadata = json.loads(text)["__metadata__"]
            content, checksum = metadata["octavo"], metadata["sha256"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Damaged(f"{path} is not a saved session, or its beginning is lost") from None
        if sha256(content.encode(errors="replace")).hexdigest() != checksum:
            raise Damaged(f"{path} is a damaged session: its header was altered")
        header = json.loads(content)
        if (version := header.pop("version")) != VERSION:
            raise OctavoError(f"{path} is a session of version {version}, and this reads version {VERSION}")
        return cls(path, **{**header, "identity": Identity(**header["identity"])})

    def check(self, here: Identity) -> None:
        """Raise OctavoError where codes mean something else than those in this file."""
        saved, otherwise = self.identity, "serve as it was saved, or begin the conversation anew"
        if saved.model != here.model:
            raise OctavoError(
                f"{self.path} was saved with other weights ({saved.model[:19]}…) than these ({here.model[:19]}…); "
                f"{otherwise}"
            )
        if saved.formats != here.formats:
            raise OctavoError(f"{self.path} holds {saved.format} codes, and this cache {here.format}; {otherwise}")
        if saved.calibration != here.calibration:
            raise OctavoError(f"{self.path} was saved under another calibration, granularity or headroom; {otherwise}")
        if (saved.arithmetic, saved.shapes) != (here.arithmetic, here.shapes):
            raise OctavoError(
                f"{self.path} holds K and V computed with {saved.arithmetic}, and this model runs with "
                f"{here.arithmetic}; {otherwise}"
            )

    def codes(self) -> Codes:
        """The tensors; raises Damaged unless they are all there and each is what was written, and OctavoError where the
        file cannot be read."""
        try:
            codes = load_file(self.path)
        except SafetensorError as error:
            raise Damaged(f"{self.path} is torn ({error})") from None
        except OSError as error:
            raise OctavoError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if {name: _checksum(tensor) for name, tensor in codes.items()} != self.checksums:
            raise Damaged(f"{self.path} was altered: its checksums are others")
        return codes


def save(path: Path, tokens: Tokens[int], codes: Codes, identity: Identity, about: dict[str, Any] | None = None) -> int:
    """Write a session file whole or not at all: beside its place, synced, then renamed. Returns its bytes."""
    header = json.dumps(
        {
            "version": VERSION,
            "tokens": list(tokens),
            "identity": asdict(identity),
            "about": about or {},
            "checksums": {name: _checksum(tensor) for name, tensor in codes.items()},
        }
    )
    metadata = {"octavo": header, "sha256": sha256(header.encode()).hexdigest()}
    try:
        # A directory of its own: safetensors too writes a temporary file, and names it as it likes.
        with TemporaryDirectory(PART, prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as own:
            part = Path(own, path.name)
            part.touch(0o600)  # what was said is its owner's alone
            save_file(codes, part, metadata)
            with part.open("rb") as written:
                os.fsync(written.fileno())
                size = os.fstat(written.fileno()).st_size
            part.replace(path)
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return size


def copy_prefix(cache: KVCache, pool: BlockPool, tokens: Tokens[int]) -> Copies:
    """A copy of the blocks that hold the longest cached prefix of `tokens`."""
    blocks = torch.tensor([index for index, _ in pool.find(tokens)], dtype=torch.int64)
    copies: Copies = []
    for _, store in _stores(cache):
        here = blocks.to(store.codes.device)
        copies.append((store.codes[here], store.scales[here] if store.scales is not None else None))
    return copies


def paste_prefix(cache: KVCache, pool: BlockPool, tokens: Tokens[int], copies: Copies) -> None:
    """Put copies of the first blocks of `tokens` into free blocks, where sequences find them as if one had computed
    them.

    What is cached already stays as it is. If too few blocks are free, the end is left out.
    """
    hits, size = pool.match(tokens), pool.block_size
    whole = min(len(copies[0][0]), pool.prefix_blocks(tokens))
    new = [pool.take() for _ in range(min(whole - len(hits), len(pool.free)))]
    part = slice(len(hits), len(hits) + len(new))
    try:
        for (_, store), (codes, scales) in zip(_stores(cache), copies, strict=True):
            here = torch.tensor(new, dtype=torch.int64, device=store.codes.device)
            store.codes[here] = codes[part].to(here.device)
            if store.scales is not None and scales is not None:
                store.scales[here] = scales[part].to(here.device)
        parent = hits[-1][1] if hits else None
        for i, index in enumerate(new, len(hits)):
            parent = pool.seal(index, parent, tokens[i * size : (i + 1) * size])
    finally:
        pool.release([*(index for index, _ in hits), *new])


def to_rows(cache: KVCache, copies: Copies) -> Codes:
    """Blocks as rows, on the CPU. Any thread may do it: nothing of the cache is read but its layouts."""
    codes = {}
    for (name, store), (blocks, scales) in zip(_stores(cache), copies, strict=True):
        every = torch.arange(len(blocks), device=blocks.device)
        codes[f"{name}.codes"] = store.layout.read_rows(blocks, every).cpu().contiguous()
        if scales is not None:
            codes[f"{name}.scales"] = store.scale_layout.read_rows(scales, every)[..., 0].cpu().contiguous()
    return codes


def to_blocks(cache: KVCache, codes: Codes) -> Copies:
    """Rows as blocks of this cache, whole ones, on the CPU. Any thread may do it."""
    count = rows(codes) // cache.layout.block_size
    slots = torch.arange(count * cache.layout.block_size)

    def laid_out(layout: RowLayout, rows: Tensor) -> Tensor:
        blocks = layout.allocate(count, rows.shape[0], CPU)
        layout.write_rows(blocks, slots, rows[:, : len(slots)].transpose(0, 1))
        return blocks

    copies: Copies = []
    for name, store in _stores(cache):
        blocks, scales = laid_out(store.layout, codes[f"{name}.codes"]), None
        if store.scales is not None:
            scales = laid_out(store.scale_layout, codes[f"{name}.scales"][..., None])
        copies.append((blocks, scales))
    return copies


def rows(codes: Codes) -> int:
    """Tokens that the codes are of."""
    return min((tensor.shape[1] for tensor in codes.values()), default=0)


def _stores(cache: KVCache) -> Iterator[tuple[str, RowStore]]:
    """Every store once, by the name that its tensors bear."""
    for i, layer in cache.owners:
        yield f"layers.{i}.k", layer.k
        yield f"layers.{i}.v", layer.v


def _checksum(tensor: Tensor) -> str:
    digest = sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
