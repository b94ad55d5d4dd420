"""A Ray cluster of two nodes on this machine, one CPU each, and what is deployed on it: started once for all tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from octavo.ray.cluster import OURS

PORT = 8917
URL = f"http://127.0.0.1:{PORT}"
SIZES: dict[str, Any] = {"session_len": 512, "max_batch_size": 4}
EXACT: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "deterministic": True}
FILE = Path(__file__).parents[2] / "docs" / "serve.yaml"
REPLICA, INGRESS, PROXY = "SERVE_REPLICA::octavo#Replica#", "SERVE_REPLICA::octavo#Ingress#", "SERVE_PROXY_ACTOR"
PATIENCE = 300  # seconds: a test machine may stand still for minutes
get, post, delete, stream = (
    partial(call, timeout=PATIENCE) for call in (httpx.get, httpx.post, httpx.delete, httpx.stream)
)
LOOKS = 0.5  # seconds from one look at what may have died to the next, in place of Serve's ten


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Its address. A test machine may stand still for minutes: no node counts as dead for that."""
    slow = {"health_check_failure_threshold": 60, "health_check_period_ms": 10_000, "health_check_timeout_ms": 60_000}
    os.environ |= OURS | {
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(LOOKS),
    }
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False, "include_log_monitor": False}
    for attempt in range(3):  # Ray gives a node 30 s to start, which is little where others compute
        try:
            nodes = Cluster(initialize_head=True, head_node_args={**node, "no_monitor": True, "_system_config": slow})
            nodes.add_node(**node)
            break
        except Exception:
            if attempt == 2:
                raise
    ray.init(nodes.address, log_to_driver=bool(os.environ.get("RAY_TEST_LOGS")), logging_level="WARNING")
    try:
        yield nodes.address
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def deploy(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Deploys docs/serve.yaml as `serve deploy` does, but smaller and with exact sums, and waits until it runs. What is
    the same stays as it is; `replicas` alone scales."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    assert cluster
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
    sessions = tmp_path_factory.getbasetemp() / "sessions"

    def run(replicas: int = 1, **changed: Any) -> None:
        config = yaml.safe_load(FILE.read_text("utf-8"))
        (app,) = config["applications"]
        app["args"]["llm"] |= EXACT | SIZES
        app["args"] |= {"cpus": 0.25, "grace": 20, "log_requests": False, "session_dir": str(sessions), **changed}
        app["deployments"] = [{"name": name, "health_check_period_s": LOOKS} for name in ("Replica", "Ingress")]
        app["deployments"][0]["num_replicas"] = replicas
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(config))
        name = changed.get("served_model_name", ["pamphlet"])[0]
        soon(lambda: running() == [name] * replicas, 3 * PATIENCE)

    return run


def running() -> list[str]:
    """The names under which replicas serve that answer."""
    with suppress(httpx.HTTPError, ValueError, KeyError):
        if (found := get(f"{URL}/cache")).status_code == 200:
            return [one["model"] for one in found.json()["replicas"]]
    return []


def ask(prompt: str | list[int], tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
    return post(f"{URL}/v1/completions", json=body)


def replicas() -> list[dict[str, Any]]:
    """What each says of its cache."""
    return get(f"{URL}/cache").json()["replicas"]


def kill(begins: str) -> None:
    """End the process of Serve's actor whose name begins so, at once."""
    import ray
    from ray.util import list_named_actors

    names = (actor["name"] for actor in list_named_actors(all_namespaces=True))
    ray.kill(ray.get_actor(next(name for name in names if name.startswith(begins)), namespace="serve"))


def kill_replica(name: str) -> None:
    kill(f"{REPLICA}{name}")


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def soon(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.2)
    return found
