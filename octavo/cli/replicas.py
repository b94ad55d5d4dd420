"""`octavo serve --replicas`: a Ray cluster of this machine alone, and the application on it until a signal."""

import json
import logging
import os
import signal
import threading
from typing import Any

from octavo.cli.loading import ServeOptions
from octavo.cli.progress import say
from octavo.cli.server_options import ServerOptions
from octavo.cores import choose
from octavo.errors import OctavoError
from octavo.ray.cluster import LOCAL, cluster
from octavo.serve.listening import bind, is_local, url

logger = logging.getLogger("octavo")


def serve_replicas(options: ServeOptions, asked: ServerOptions, replicas: int, as_json: bool) -> None:
    tls = {"ssl_certfile": asked.ssl_certfile, "ssl_keyfile": asked.ssl_keyfile}
    with bind(asked.host, asked.port) as sock:  # refuses what cannot be served; Ray opens it again
        if not asked.api_key and not is_local(sock):
            logger.warning("anyone who reaches %s can use the model: set --api-key", asked.host)
        port, address = sock.getsockname()[1], url(sock, asked.ssl_certfile is not None)
    say(f"starting {replicas} replicas on Ray")
    stop = threading.Event()
    with cluster(LOCAL, "--replicas"):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        from octavo.ray.application import app
        from octavo.ray.args import Args

        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: stop.set())
        args = Args(llm=options.arguments(), replicas=replicas, **_share(options, replicas), **asked.of_replicas())
        files = {name: str(file) for name, file in tls.items() if file}
        serve.start(http_options={"host": asked.host, "port": port, **files})
        try:
            try:
                serve.run(app(args), name="octavo", route_prefix="/")
            except RuntimeError:
                raise OctavoError("the replicas cannot start: what they wrote above says why") from None
            if as_json:
                print(json.dumps({"url": address, "replicas": replicas}), flush=True)
            else:
                say(f"{replicas} replicas: a chat at {address}/, the API at {address}/v1")
            stop.wait()
        finally:
            serve.shutdown()


def _share(options: ServeOptions, replicas: int) -> dict[str, Any]:
    """Each replica's part of this machine: a GPU, or as many cores as there are for each, and at least one."""
    import torch

    if options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available()):
        return {"gpus": options.tensor_parallel_size, "cpus": 0}
    cores = int(os.environ.get("OMP_NUM_THREADS", 0)) or choose().threads
    return {"cpus": min(max(1, cores // replicas), (os.cpu_count() or 1) / replicas)}
