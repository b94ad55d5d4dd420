"""`octavo serve`: the server."""

from __future__ import annotations

import gc
import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.loading import ServeOptions
from octavo.cli.options import amount, option, takes, tell_loading
from octavo.errors import OctavoError, install, one_line
from octavo.serve.limits import Limits, keep_few_shapes

if TYPE_CHECKING:
    from octavo.llm import LLM


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogRequests(StrEnum):
    line = "line"
    none = "none"


logger = logging.getLogger("octavo")


def serving(help: str, *names: str, **more: Any) -> Any:
    return option(help, *names, panel="Server", **more)


@takes(ServeOptions)
def serve(
    options: ServeOptions,
    host: Annotated[str, serving("Address to listen on; 0.0.0.0 for every one of this machine's.")] = "127.0.0.1",
    port: Annotated[int, serving("0 takes a free one.", min=0, max=65535)] = 8000,
    uds: Annotated[Path | None, serving("A UNIX socket to listen on, in place of an address.", dir_okay=False)] = None,
    ssl_certfile: Annotated[Path | None, serving("Serve HTTPS by this certificate and its chain (PEM).")] = None,
    ssl_keyfile: Annotated[Path | None, serving("Its key, if that is a file of its own.")] = None,
    served_model_name: Annotated[
        list[str] | None, serving("The model's name in the API; may be repeated: each is served. [default: MODEL]")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        serving(
            "Clients must send it: Authorization: Bearer KEY. May be repeated: then each key is a client of its own.",
            envvar="OCTAVO_API_KEY",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, serving("A web page's origin that may ask from a browser; may be repeated.")
    ] = None,
    max_queue: Annotated[
        int, serving("Answers that may wait; beyond, the client with the most is refused with 429.", min=0)
    ] = Limits.max_queue,
    timeout: Annotated[
        float, serving("Seconds an answer may take, its time in the queue included.", min=0.001)
    ] = Limits.timeout,
    max_body: Annotated[int, serving("Bytes a request may have.", min=1)] = Limits.max_body,
    max_connections: Annotated[
        int | None,
        serving(f"Open at a time; beyond, idle ones are closed. [default: {Limits.max_connections}]", min=1),
    ] = None,
    patience: Annotated[
        float | None,
        serving(
            "Seconds a client may take to send a request, or to read more of its answer. "
            f"[default: {Limits.patience:g}]",
            min=1,
        ),
    ] = None,
    grace: Annotated[float, serving("Seconds that running answers have to end at SIGTERM or Ctrl-C.", min=0)] = 30,
    replicas: Annotated[
        int | None, serving("Models side by side behind one address, each a process; needs octavo[ray].", min=1)
    ] = None,
    session_dir: Annotated[
        Path | None, serving("Keep conversations' caches here, over restarts too.", file_okay=False)
    ] = None,
    session_dir_size: Annotated[
        str | None,
        serving("Bytes they may take; the least recently used are removed. [default: 10GiB]", callback=amount),
    ] = None,
    ignore_unknown_fields: Annotated[
        bool, serving("Leave out fields of requests that are not known, in place of refusing them.")
    ] = False,
    log_level: Annotated[
        LogLevel, serving("What is logged of: with debug, also why a request is refused, and where loading failed.")
    ] = LogLevel.info,
    log_requests: Annotated[LogRequests, serving("A line for each request, or none.")] = LogRequests.line,
    log_prompts: Annotated[bool, serving("Log errors with all they say, which may quote what clients sent.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Tell on stdout, as one line of JSON, what is served.")
    ] = False,
) -> None:
    """Serve OpenAI's API, chat, completions and responses, Anthropic's messages, and a chat page."""
    if replicas is not None:
        from octavo.ray.cluster import require

        require("octavo serve --replicas")
        if any(given is not None for given in (uds, max_connections, patience)):
            raise OctavoError("--uds, --max-connections and --patience are a single server's: leave them out")
    tell_loading(options.model)
    from octavo.units import parse_bytes

    try:
        from octavo.serve import logs
        from octavo.serve.listening import Tls, bind, bind_unix, curl, listening, url

        if replicas is None:  # they import the rest, seconds of it, themselves
            from octavo.serve.server import Server
            from octavo.serve.sessions import SessionDir
    except ImportError as error:
        raise OctavoError(f"`octavo serve` needs {error.name}: {install('serve')}") from None

    keep_few_shapes()
    if session_dir_size is not None and session_dir is None:
        raise OctavoError("--session-dir-size bounds what --session-dir keeps: give one")
    room = parse_bytes(session_dir_size or "10GiB")
    if ssl_keyfile is not None and ssl_certfile is None:
        raise OctavoError("--ssl-keyfile belongs to a certificate: give --ssl-certfile too")
    logs.start(log_prompts, log_level.value, log_requests is LogRequests.line)
    if replicas is not None:
        from octavo.cli.replicas import serve_replicas

        asked = {
            "served_model_name": served_model_name or [],
            "api_key": api_key or [],
            "cors_origin": cors_origin or [],
            "max_queue": max_queue,
            "timeout": timeout,
            "max_body": max_body,
            "grace": grace,
            "session_dir": session_dir and str(session_dir.resolve()),
            "session_dir_size": session_dir_size or "10GiB",
            "ignore_unknown_fields": ignore_unknown_fields,
            "log_level": log_level.value,
            "log_requests": log_requests is LogRequests.line,
            "log_prompts": log_prompts,
        }
        tls_files = {"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile}
        serve_replicas(options, replicas, host, port, tls_files, asked, as_json)
        return
    tls = Tls(ssl_certfile, ssl_keyfile) if ssl_certfile else None
    if tls:
        tls.check()
    with listening(bind_unix(uds) if uds else bind(host, port)) as sock:
        llm = _loaded(options)
        sessions = SessionDir(session_dir, room, llm) if session_dir else None
        limits = Limits(
            max_queue, timeout, max_body, max_connections or Limits.max_connections, patience or Limits.patience
        )
        doors: dict[str, Any] = {"tls": tls, "api_key": api_key or (), "cors_origins": tuple(cors_origin or ())}
        doors["ignore_unknown"] = ignore_unknown_fields
        server = Server(llm, sock, served_model_name or (), limits, grace=grace, sessions=sessions, **doors)
        state = {"url": url(sock, tls is not None), "model": server.service.name, **_facts(llm)}
        if as_json:
            print(json.dumps(state), flush=True)
        else:
            _banner(state)
            chat = bool(getattr(llm.tokenizer, "chat_template", None))
            print(curl(sock, tls is not None, bool(api_key), chat), file=sys.stderr, flush=True)
        gc.freeze()  # what is loaded stays: looking through all of it again and again would stop the server for a while
        try:
            server.run()
        finally:
            gc.unfreeze()  # what is frozen is never freed, not at the process's end either


def _loaded(options: ServeOptions) -> LLM:
    """The model, or one line that says why there is none."""
    try:
        return options.llm(told=True)
    except (OctavoError, KeyboardInterrupt):
        raise
    except Exception as error:
        logger.debug("the model cannot be loaded", exc_info=error)
        raise OctavoError(
            f"the model cannot be loaded: {type(error).__name__}: {one_line(error)}; --log-level debug says where"
        ) from error


def _facts(llm: LLM) -> dict[str, Any]:
    from octavo.measure.memory.footprint import Footprint

    cache, one = llm.cache, Footprint.of(llm, llm.session_len)
    return {
        "kv": str(llm.format),
        "cache_bytes": cache.nbytes,
        "cache_tokens": cache.num_blocks * cache.layout.block_size,
        "session_len": llm.session_len,
        "sessions": cache.num_blocks // one.blocks,
        "token_bytes": one.size.token,
        "token_bytes_16_bits": one.size_16.token,
    }


def _banner(state: dict[str, Any]) -> None:
    from octavo.units import format_bytes

    print(
        f"{state['model']}: a chat at {state['url']}/, the API at {state['url']}/v1\n"
        f"KV cache {state['kv']}, {format_bytes(state['cache_bytes'])}: {state['cache_tokens']:,} tokens, "
        f"{state['sessions']:,} sessions of {state['session_len']:,}",
        file=sys.stderr,
        flush=True,
    )
