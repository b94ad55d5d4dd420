"""The request router that Ray Serve runs in every ingress; the policy is choice.py's."""

from typing import Any

from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import PendingRequest, RequestRouter

from octavo.ray.choice import choose


class ByPrefix(RequestRouter):
    """Chooses by the key of the conversation, the request's first argument."""

    def initialize_state(self, free: int, by_key: bool = True) -> None:
        """`free` as in `choose`; without `by_key` any two replicas are the choice, for comparison."""
        self.free, self.by_key = free, by_key

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if nobody takes it: not again at once
            args: list[Any] = pending_request.args
            key = args[0] if self.by_key and args else ""
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in named.items()}
        return [[named[name] for name in rank] for rank in choose(key, loads, self.free)]
