"""What every request goes through: it is counted, its client told apart, and but for a few paths asked for a key."""

import hashlib
import hmac
import ipaddress
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.serve.accounting import Account
from octavo.serve.errors import ApiError, refusal
from octavo.serve.service import Service

OPEN = ("/health", "/ping", "/version", "/openapi.json")  # without a key, as the page is, which asks for it


class Gate:
    """`known` are the paths that have a number of their own; `page` those of the page."""

    def __init__(
        self, app: ASGIApp, service: Service, keys: tuple[str, ...], known: Collection[str], page: Collection[str]
    ):
        self.app, self.service, self.known = app, service, known
        self.open = {*OPEN, *page}
        self.keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self.known else "other"
        account = Account(scope["method"], route, key=scope.get("octavo.key", ""))
        scope["octavo.account"] = account

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
            await send(message)

        try:
            if b"transfer-encoding" in dict(scope["headers"]):
                error = ApiError(411, "the body must be sent with its Content-Length", headers={"Connection": "close"})
                await refusal(scope, error)(scope, receive, counted)
            elif (client := self._client(scope)) is not None:
                account.client = client
                await self.app(scope, receive, counted)
            else:
                error = ApiError(401, "this server asks for a key: Authorization: Bearer KEY", code="invalid_api_key")
                await refusal(scope, error)(scope, receive, counted)
        except Exception:  # it is answered outside of here
            account.status = 500
            raise
        finally:
            self.service.metrics.requests.labels(account.route, account.status).inc()
            account.log()

    def _client(self, scope: Scope) -> str | None:
        """Who asks: where there are several keys the key's number, else the address. None: it may not."""
        address = (scope.get("client") or ("local",))[0]  # a UNIX socket has no address
        if not self.keys or scope["path"] in self.open:
            return _network(address)
        headers = dict(scope["headers"])
        bearer = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        given = bearer or headers.get(b"x-api-key", b"")  # Anthropic's clients send the second
        fits = [hmac.compare_digest(_digest(given), key) for key in self.keys]  # all of them, whichever fits
        if not given or True not in fits:  # an empty key opens nothing
            return None
        return _network(address) if len(fits) == 1 else f"key {fits.index(True)}"


def _digest(text: bytes) -> bytes:
    """Of one length for all, so that comparing takes the same time for all."""
    return hashlib.sha256(text).digest()


def _network(address: str) -> str:
    """An address, or of IPv6 the network of 64 bits that one host is given."""
    try:
        return str(ipaddress.IPv6Network((address, 64), strict=False)) if ":" in address else address
    except ValueError:
        return address
