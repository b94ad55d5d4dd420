"""A cache of codes for models that `attach` does not reach: attention is transformers' own and gets decoded tensors.

It saves memory and costs time. In every step each layer's codes are decoded into K and V of the whole context, in the
model's type, and freed after that layer. Attention on codes, as `attach` has it, needs neither that time nor that
memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from octavo.cache.size import BLOCK_SIZE
from octavo.errors import OctavoError, Unsupported
from octavo.quant.codec import Rows, decode, encode
from octavo.quant.format import Codec, KVFormat


class DecodedSide:
    """K or V of one layer: codes and, with edges, the rows of the first page and of the own span as they were."""

    def __init__(self, codec: Codec, span: int, like: Tensor):
        self.codec, self.span = codec, span
        batch, heads, _, self.dim = like.shape
        # [batch, tokens, heads, …]: codes, scales of token codecs, and the raw rows of first page and own span
        self.codes = encode(like.transpose(1, 2)[:, :0], codec).codes.clone()
        self.scales = torch.empty(batch, 0, heads, dtype=torch.uint8, device=like.device)
        self.first = self.own = like.new_empty(batch, 0, heads, self.dim)

    def __len__(self) -> int:
        return self.codes.shape[1]

    def add(self, x: Tensor) -> Tensor:
        """Store x [batch, heads, tokens, dim]; returns all rows, those of x as they are."""
        x = x.transpose(1, 2)
        coded = encode(x, self.codec)
        read = torch.cat([self.read(), x], 1).transpose(1, 2)
        self.codes = torch.cat([self.codes, coded.codes], 1)
        if coded.scales is not None:
            self.scales = torch.cat([self.scales, coded.scales], 1)
        if self.span:
            # Copies: a view would keep all rows of a long prompt in memory.
            self.first = torch.cat([self.first, x], 1)[:, :BLOCK_SIZE].clone()
            rows = torch.cat([self.own, x], 1)
            self.own = rows[:, rows.shape[1] - len(self) % self.span :].clone()
        return read

    def read(self) -> Tensor:
        """[batch, tokens, heads, dim] in the model's type: what the next query reads."""
        rows = Rows(self.codes, self.scales if self.codec.has_token_scale else None)
        read = decode(rows, self.codec, self.dim).to(self.first.dtype)
        read[:, : self.first.shape[1]] = self.first
        read[:, len(self) - self.own.shape[1] :] = self.own
        return read

    def crop(self, length: int) -> None:
        """Keep `length` tokens. Of an own span that had been left behind, raw rows are what codes stand for."""
        if self.span:
            self.own = self.read()[:, length - length % self.span : length].clone()
        self.codes, self.scales, self.first = (x[:, :length].clone() for x in (self.codes, self.scales, self.first))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch of every tensor."""
        for name in ("codes", "scales", "first", "own"):
            setattr(self, name, change(getattr(self, name)))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.scales, self.first, self.own))


class DecodedLayer(DynamicLayer):
    """One layer of full attention."""

    def __init__(self, format: KVFormat):
        super().__init__()
        self.format = format
        self.sides: tuple[DecodedSide, DecodedSide] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        span = self.format.edges
        self.sides = DecodedSide(self.format.k, span, key_states), DecodedSide(self.format.v, span, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.sides is None:
            self.lazy_initialization(key_states, value_states)
        assert self.sides is not None
        return self.sides[0].add(key_states), self.sides[1].add(value_states)

    def get_seq_length(self) -> int:
        return len(self.sides[0]) if self.sides else 0

    def reset(self) -> None:
        self.sides = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        length = max(0, self.get_seq_length() - abs(tokens_to_remove))
        for side in self.sides or ():
            side.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self.sides or ():
            side.map(change)


class DecodedCache(DynamicCache):
    """K and V as codes, decoded in every step, for any model that takes transformers' DynamicCache.

    `config` is the model's, `kv` a format that needs no calibration. Layers of full attention are coded; layers with a
    window, which hold no more than that, and recurrent states are transformers' own. A step's own rows are read as they
    are, earlier ones as the format says; with left padding, edges count from the padding on.
    """

    def __init__(self, config: Any, kv: str | KVFormat = "kv8"):
        super().__init__(config=config)
        layers: list[Any] = vars(self)["layers"]
        format = kv if isinstance(kv, KVFormat) else KVFormat.parse(kv)
        if format.needs_calibration or format.calibrates_first:
            raise OctavoError(f"{format} needs a calibration, which only models that attach() takes can have: use kv8")
        self.layers = [DecodedLayer(format) if type(layer) is DynamicLayer else layer for layer in layers]
        if not self.coded:
            raise Unsupported(f"{config.model_type} has no layer of full attention: there is nothing to store as codes")

    @property
    def coded(self) -> list[DecodedLayer]:
        """The layers that are stored as codes."""
        return [layer for layer in self.layers if isinstance(layer, DecodedLayer)]

    @property
    def nbytes(self) -> int:
        """Of the coded layers, between two steps."""
        return sum(side.nbytes for layer in self.coded for side in layer.sides or ())
