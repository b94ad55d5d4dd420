"""How a model is divided by transformers' plan, and which models and options are refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from octavo.errors import Unsupported
from octavo.models.bind import BoundModel
from octavo.models.files import is_adapter
from octavo.models.geometry import rank_counts
from octavo.models.locate import is_gguf
from octavo.parallel.model import ParallelModel
from octavo.parallel.ranks import Ranks
from octavo.parallel.styles import DIVIDED, Plan, by_outputs, general, is_linear, settle
from octavo.weights.linear import PackedLinear

ONE = "leave --tensor-parallel-size out"


def check(path: Path, name: str, loading: dict[str, Any]) -> None:
    """Raise Unsupported for weights and options that are not divided."""
    if is_gguf(path):
        raise Unsupported(f"{name} is a GGUF file, which is not divided among ranks: {ONE}, or name a directory")
    if is_adapter(path):
        raise Unsupported(
            f"{name} is a LoRA adapter, which is not divided among ranks: {ONE}, or merge it first with peft's "
            "merge_and_unload"
        )
    if loading.get("device_map") is not None:
        raise Unsupported("a device map and --tensor-parallel-size each divide the model: give one")
    if loading.get("load_format", "auto") != "auto":
        raise Unsupported(f"dummy weights are not divided among ranks: {ONE}")


class ByPlan:
    """A rank's part of a model: octavo.models.load.Division."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.kv_heads = 0
        self.repeated: set[str] = set()  # projections to KV heads that several ranks have
        self.plan: Plan = {}
        self.joining: set[str] = set()  # layers that bring their inputs together

    def arguments(self, architecture: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, Any]:
        text, ranks, name = config.get_text_config(), self.ranks.count, config.model_type
        if not text.base_model_tp_plan:
            raise Unsupported(
                f"transformers has no tensor-parallel plan for {name}: {ONE}, or spread it over GPUs with "
                "--device-map auto"
            )
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if ranks not in (fits := rank_counts(config)):
            remedy = f"use {' or '.join(map(str, fits[1:]))}" if fits[1:] else ONE
            raise Unsupported(
                f"the {heads} query and {kv_heads} KV heads of {name} cannot be divided among {ranks} ranks: {remedy}"
            )
        self.kv_heads = kv_heads
        with torch.device("meta"):
            bare: Any = architecture
            model = bare._from_config(deepcopy(config))
        changed, self.joining = by_outputs(model, model.tp_plan)
        if kv_heads < ranks:
            prefix = "model." if text is config else "model.language_model."
            self.repeated = {
                prefix + key
                for key, style in text.base_model_tp_plan.items()
                if style == "colwise" and key.endswith((".k_proj", ".v_proj"))
            }
            changed |= dict.fromkeys(self.repeated, "replicate")
        self.plan = model.tp_plan | changed
        return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan=changed or None)}

    def rows(self, layer: str, outputs: int) -> slice:
        if general(layer) in self.repeated:
            size, head = outputs // self.kv_heads, self.ranks.rank * self.kv_heads // self.ranks.count
            return slice(head * size, (head + 1) * size)
        return self.ranks.own(outputs) if self.plan.get(general(layer)) in DIVIDED else slice(0, outputs)

    def settle(self, model: PreTrainedModel) -> None:
        settle(model, self.plan, self.joining, self.ranks)
        for name, module in model.named_modules():
            if general(name) in self.repeated and is_linear(module):
                _keep(module, self.rows(name, module.out_features))

    def join(self, bound: BoundModel) -> BoundModel:
        if bound.states:
            raise Unsupported(
                f"{bound.hf.config.model_type} keeps states beside K and V, which are not divided among ranks: {ONE}"
            )
        return ParallelModel(bound, self.ranks)


def _keep(layer: nn.Linear | PackedLinear, rows: slice) -> None:
    """Of a layer that was read whole, some outputs; one in 4 bits has no others already."""
    for name, x in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(x[rows].clone(), requires_grad=False))
    layer.out_features = rows.stop - rows.start
