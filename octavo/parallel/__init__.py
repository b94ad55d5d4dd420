"""Tensor parallel: one model divided among several processes (ranks), each with its own device.

transformers' plan (`base_model_tp_plan`) says how each weight is divided, and every rank reads its share alone
(division.py, styles.py). Rank 0 is the process of whoever makes the LLM: it has the scheduler, the sampler and all
texts. The others do what it does (follower.py): it sends them each cache that it makes and each step's batch
(model.py), and the products of the layers meet in torch.distributed, NCCL on GPUs and gloo on CPUs.

A rank has the K and V of its own KV heads (heads.py). Formats, blocks and prefix hashes are the same everywhere, so
only rank 0 knows of them; a calibration is sliced, and a saved session has the rows of all heads.
"""
