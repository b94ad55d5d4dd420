"""Runs the model over one step's batch: every layer's attention writes its codes and reads the cache."""

from __future__ import annotations

from torch import Tensor

from octavo.attention import attend
from octavo.cache.batch import Batch
from octavo.cache.store import KVCache
from octavo.models.bind import BoundModel


class Runner:
    """A model on a cache. Several runners may share a model, each with a cache of its own format."""

    def __init__(self, model: BoundModel, cache: KVCache):
        self.model, self.cache = model, cache

    def run(self, batch: Batch) -> Tensor:
        """Logits [sequences whose next token is due, vocabulary], in the model's dtype."""
        specs, caches = self.model.layers, self.cache.layers

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(specs[layer], caches[layer], q, k, v, batch)

        batch = batch.on(self.model.device)
        return self.model.forward(batch.ids, batch.positions, batch.logits_at, attention)
