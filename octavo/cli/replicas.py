"""`octavo serve --replicas`: a Ray cluster of this machine alone, and the application on it until a signal."""

import json
import logging
import signal
import threading

from octavo.cli.loading import ServeOptions
from octavo.cli.progress import say
from octavo.cli.server_options import ServerOptions
from octavo.errors import OctavoError
from octavo.ray.cluster import LOCAL, cluster, placement
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
        place = placement(replicas, options.device, options.tensor_parallel_size)
        llm, others = options.arguments(), asked.of_replicas()
        args = Args(llm=llm, replicas=replicas, cpus=place.cpus, gpus=place.gpus, **others)
        files = {name: str(file) for name, file in tls.items() if file}
        serve.start(http_options={"host": asked.host, "port": port, **files})
        try:
            try:
                serve.run(app(args), name="octavo", route_prefix="/")
            except RuntimeError:
                raise OctavoError(f"the replicas cannot start: {_why()}") from None
            if as_json:
                print(json.dumps({"url": address, "replicas": replicas}), flush=True)
            else:
                say(f"{replicas} replicas: a chat at {address}/, the API at {address}/v1")
            stop.wait()
        finally:
            serve.shutdown()


def _why() -> str:
    """The error that one of them has ended with, in Ray's report of it: of ours the words alone."""
    from ray import serve

    found = [one.message for one in serve.status().applications["octavo"].deployments.values() if one.message]
    lines = "\n".join(found).strip().splitlines() or ["Ray does not say why"]
    return next((line.partition(": ")[2] for line in lines if line.startswith("octavo.errors.")), lines[-1])
