"""Past one process and one machine, on Ray: replicas of the server, and batches over datasets.

Why Ray: it has serving (Serve), batches (Data) and placement, vLLM and SGLang run on it, and nothing else has them all.

cluster.py      a cluster is reached, or started on this machine
application.py  what `serve run` and `octavo serve --replicas` deploy     args.py      what can be set of it
ingress.py      one address before all replicas     replica.py   the HTTP application in a replica
keys.py         what tells conversations apart      choice.py    which replica gets one     router.py   Ray's side of it
merged.py       metrics and the cache's state of all replicas in one document
generate.py     rows of a dataset, or of files, are answered     shards.py    files cut up, and their answers
measuring.py    a calibration, and comparisons of accuracy, each worker with a part of the texts

Nothing in Octavo imports this unless it is asked for, and this alone imports Ray.
"""

from importlib import import_module

LAZY = {"app": "octavo.ray.application", "Args": "octavo.ray.args", "Generate": "octavo.ray.generate"}


def __getattr__(name: str) -> object:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'octavo.ray' has no attribute {name!r}")
