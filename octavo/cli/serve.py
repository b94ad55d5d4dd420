"""`octavo serve`: the server."""

from __future__ import annotations

import gc
import json
import logging
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.loading import ServeOptions
from octavo.cli.options import option, takes, tell_loading
from octavo.cli.progress import say
from octavo.cli.server_options import ServerOptions
from octavo.errors import OctavoError, install, one_line
from octavo.serve.limits import keep_few_shapes

if TYPE_CHECKING:
    from octavo.llm import LLM

logger = logging.getLogger("octavo")


@takes(ServeOptions, ServerOptions)
def serve(
    options: ServeOptions,
    server: ServerOptions,
    as_json: Annotated[bool, option("Tell on stdout, as one line of JSON, what is served.", "--json")] = False,
) -> None:
    """Serve OpenAI's API, chat, completions and responses, Anthropic's messages, and a chat page."""
    tell_loading(options.model)
    keep_few_shapes()
    try:
        from octavo.serve import logs

        if server.replicas is None:  # they import the rest, seconds of it, themselves
            import_module("octavo.serve.server")
    except ImportError as error:
        raise OctavoError(f"`octavo serve` needs {error.name}: {install('serve')}") from None

    logs.start(**server.logging)
    if server.replicas is None:
        _serve_one(options, server, as_json)
    else:
        from octavo.cli.replicas import serve_replicas

        serve_replicas(options, server, server.replicas, as_json)


def _serve_one(options: ServeOptions, asked: ServerOptions, as_json: bool) -> None:
    from octavo.measure.memory.footprint import whole_cache
    from octavo.serve.listening import bind, bind_unix, curl, listening, url
    from octavo.serve.server import Server
    from octavo.serve.sessions import SessionDir
    from octavo.units import parse_bytes

    secure = asked.tls is not None
    with listening(bind_unix(asked.uds) if asked.uds else bind(asked.host, asked.port)) as sock:
        llm = _loaded(options)
        server = Server(
            llm,
            sock,
            asked.served_model_name or (),
            asked.limits,
            tls=asked.tls,
            api_key=asked.api_key or (),
            cors_origins=tuple(asked.cors_origin or ()),
            grace=asked.grace,
            sessions=SessionDir(asked.session_dir, parse_bytes(asked.session_room), llm) if asked.session_dir else None,
            ignore_unknown=asked.ignore_unknown_fields,
        )
        state = {"url": url(sock, secure), "model": server.service.name, **whole_cache(llm)}
        if as_json:
            print(json.dumps(state), flush=True)
        else:
            _banner(state)
            chat = bool(getattr(llm.tokenizer, "chat_template", None))
            say(curl(sock, secure, bool(asked.api_key), chat))
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


def _banner(state: dict[str, Any]) -> None:
    from octavo.units import format_bytes

    say(
        f"{state['model']}: a chat at {state['url']}/, the API at {state['url']}/v1\n"
        f"KV cache {state['kv']}, {format_bytes(state['cache_bytes'])}: {state['cache_tokens']:,} tokens, "
        f"{state['sessions']:,} sessions of {state['session_len']:,}"
    )
