"""What the command line says of a server: where it listens, who may ask, and how much it takes on."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from octavo.cli.options import amount, option
from octavo.errors import OctavoError, require_writable
from octavo.serve.limits import Limits
from octavo.serve.listening import Tls

SESSIONS = "10GiB"
serving = partial(option, panel="Server")


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogRequests(StrEnum):
    line = "line"
    none = "none"


@dataclass
class ServerOptions:
    """Of one server, or of several replicas behind one address."""

    host: Annotated[str, serving("Address to listen on; 0.0.0.0 for every one of this machine's.")] = "127.0.0.1"
    port: Annotated[int, serving("Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000
    uds: Annotated[Path | None, serving("A UNIX socket to listen on, in place of an address.", dir_okay=False)] = None
    ssl_certfile: Annotated[Path | None, serving("Serve HTTPS by this certificate and its chain (PEM).")] = None
    ssl_keyfile: Annotated[Path | None, serving("The certificate's key, if it is not in the same file.")] = None
    served_model_name: Annotated[
        list[str] | None, serving("The model's name in the API; may be repeated: each is served. [default: MODEL]")
    ] = None
    api_key: Annotated[
        list[str] | None,
        serving(
            "Key that clients must send (Authorization: Bearer KEY). May be repeated: each is a client of its own.",
            envvar="OCTAVO_API_KEY",
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None, serving("A web page's origin that may ask from a browser; may be repeated.")
    ] = None
    max_queue: Annotated[
        int, serving("Answers that may wait; beyond that, the client with the most is refused with 429.", min=0)
    ] = Limits.max_queue
    timeout: Annotated[float, serving("Seconds an answer may take, its time in the queue included.", min=0.001)] = (
        Limits.timeout
    )
    max_body: Annotated[int, serving("Bytes a request may have.", min=1)] = Limits.max_body
    max_connections: Annotated[
        int | None,
        serving(
            f"Connections open at a time; beyond that, idle ones are closed. [default: {Limits.max_connections}]", min=1
        ),
    ] = None
    patience: Annotated[
        float | None,
        serving(
            "Seconds a client may take to send a request, or to read more of its answer. "
            f"[default: {Limits.patience:g}]",
            min=1,
        ),
    ] = None
    grace: Annotated[float, serving("Seconds that running answers have to end at SIGTERM or Ctrl-C.", min=0)] = 30
    replicas: Annotated[
        int | None, serving("Copies of the model behind one address, each a process; needs the extra `ray`.", min=1)
    ] = None
    session_dir: Annotated[
        Path | None, serving("Keep conversations' caches here, over restarts too.", file_okay=False)
    ] = None
    session_dir_size: Annotated[
        str | None,
        serving(
            f"Size that --session-dir may reach; the least recently used go first. [default: {SESSIONS}]",
            callback=amount,
        ),
    ] = None
    ignore_unknown_fields: Annotated[
        bool, serving("Leave out fields of requests that are not known, in place of refusing them.")
    ] = False
    log_level: Annotated[
        LogLevel,
        serving("The least that is logged; debug also says why a request is refused, and where loading failed."),
    ] = LogLevel.info
    log_requests: Annotated[LogRequests, serving("A line for each request, or none.")] = LogRequests.line
    log_prompts: Annotated[bool, serving("Log errors with all they say, which may quote what clients sent.")] = False

    def check(self) -> None:
        """Raise OctavoError for options that exclude each other, or that mean nothing without another."""
        if self.replicas is not None:
            from octavo.ray.cluster import require

            require("octavo serve --replicas")
            if any(given is not None for given in (self.uds, self.max_connections, self.patience)):
                raise OctavoError("--uds, --max-connections and --patience are a single server's: leave them out")
        if "" in (self.api_key or ()):
            raise OctavoError("--api-key is empty: is the variable set that it comes from?")
        if self.session_dir is not None and self.replicas is None:
            require_writable(self.session_dir, "--session-dir")
        if self.session_dir_size is not None and self.session_dir is None:
            raise OctavoError("--session-dir-size bounds what --session-dir keeps: give one")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise OctavoError("--ssl-keyfile belongs to a certificate: give --ssl-certfile too")
        if self.tls is not None:
            self.tls.check()

    @property
    def tls(self) -> Tls | None:
        """What HTTPS is served by; None for HTTP."""
        return Tls(self.ssl_certfile, self.ssl_keyfile) if self.ssl_certfile is not None else None

    @property
    def logging(self) -> dict[str, Any]:
        """Arguments of serve.logs.start."""
        requests = self.log_requests is LogRequests.line
        return {"prompts": self.log_prompts, "level": self.log_level.value, "requests": requests}

    @property
    def session_room(self) -> str:
        """What saved sessions may take."""
        return self.session_dir_size or SESSIONS

    @property
    def limits(self) -> Limits:
        connections, patience = self.max_connections or Limits.max_connections, self.patience or Limits.patience
        return Limits(self.max_queue, self.timeout, self.max_body, connections, patience)

    def of_replicas(self) -> dict[str, Any]:
        """Fields of `octavo.ray.Args`, which bear the same names."""
        names = ("max_queue", "timeout", "max_body", "grace", "ignore_unknown_fields", "log_prompts")
        several = ("served_model_name", "api_key", "cors_origin")
        return {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(self, name) or [] for name in several},
            "session_dir": self.session_dir and str(self.session_dir.resolve()),
            "session_dir_size": self.session_room,
            "log_level": self.log_level.value,
            "log_requests": self.log_requests is LogRequests.line,
        }
