"""Tensor parallel: one model divided among several processes (ranks), each with its own device.

transformers' plan (`base_model_tp_plan`) says which layers are divided, always by their outputs, and every rank reads
its share alone (division.py, styles.py): answers do not depend on the number of ranks. Rank 0 is the process of whoever
makes the LLM: it has the scheduler, the sampler and all texts. The others do what it does (follower.py): it sends them
each cache that it makes and each step's batch (model.py), and rows are gathered by torch.distributed, NCCL on GPUs and
gloo on CPUs.

A rank has the K and V of its own KV heads (heads.py). Formats, blocks and prefix hashes are the same everywhere, so
only rank 0 knows of them; a calibration is sliced, and a saved session has the rows of all heads.
"""

from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.models.model import Model

MOST = 64


def load(model: str | Path | None, ranks: int = 1, **loading: Any) -> Model:
    """As `Model.load`, divided among so many ranks: this process is rank 0, the others end with it.

    Where torchrun has started this process the ranks are those of torchrun: the call returns on rank 0 alone, and ends
    the processes of the others when rank 0 does. Raises OctavoError for a model that cannot be divided so.
    """
    if ranks not in range(1, MOST + 1):
        raise OctavoError(f"tensor_parallel_size is {ranks!r}; it must be a whole number from 1 to {MOST}")
    if ranks == 1:
        return Model.load(model, **loading)
    from octavo.parallel.start import start  # torch.distributed takes a second to import

    return start(model, ranks, **loading)
