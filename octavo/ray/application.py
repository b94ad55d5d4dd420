"""The application: what can be set of it, and the deployments that it is made of.

`serve run octavo.ray:app model=…` deploys it, or a file that `serve deploy` takes (docs/serve.yaml). Deploying a file
with another model replaces the replicas one after the other, each once its answers have ended.
"""

from functools import partial

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from octavo.ray.args import Args
from octavo.ray.ingress import Ingress
from octavo.ray.replica import Replica
from octavo.ray.router import ByPrefix
from octavo.serve.response_store import InMemory

LATE = 10.0  # seconds after which the ingress gives a request up that its replica should have
SAVING = 30.0  # seconds that a replica has after its last answer
STARTS = 3  # of replicas that may fail before one of them has run
POLL = 0.2  # seconds after which who is told to end looks again whether its requests have
LOOKS = 64  # requests a replica takes beside those it answers: they only look
ONGOING = 100_000  # requests that pass through one ingress


def app(args: Args) -> Application:
    """Replicas of the server behind one address. Ray's own options of the deployments Ingress, Replica and Responses
    (num_replicas, autoscaling_config, ray_actor_options, …) can be set in the file that deploys it."""
    batch = int(args.llm.get("max_batch_size", 16))
    free = max(1, batch // 2)
    routing = RequestRouterConfig(
        request_router_class=ByPrefix, request_router_kwargs={"free": free, "by_key": args.route == "prefix"}
    )
    deployment = partial(
        serve.deployment,
        graceful_shutdown_timeout_s=args.grace + SAVING,
        graceful_shutdown_wait_loop_s=POLL,
        logging_config=LoggingConfig(enable_access_log=False),  # of Ray's own; replicas write a line for each request
    )
    light = partial(deployment, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=ONGOING)
    responses = light(InMemory, name="Responses")
    ingress = light(Ingress, name="Ingress", num_replicas=args.ingresses)
    replica = deployment(
        Replica,
        name="Replica",
        num_replicas=args.replicas,
        max_constructor_retry_count=STARTS,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=batch + args.max_queue + LOOKS,
        request_router_config=routing,
    )
    return ingress.bind(replica.bind(args, responses.bind()), args.timeout + LATE, args.max_body)
