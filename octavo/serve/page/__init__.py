"""The page at /: a chat, and beside it the cache. Its files load nothing but each other; no build step.

app.js       what happens            chats.js  conversations kept    server.js  what is asked
text.js      Markdown                cache.js  the cache drawn       settings.js, theme.js
vendor/      Markdown's parser and the sanitizer
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

HERE = Path(__file__).parent
FILES = [
    str(file.relative_to(HERE))
    for pattern in ("index.html", "style.css", "icon.svg", "*.js", "vendor/*.js")
    for file in sorted(HERE.glob(pattern))
]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for again after an update
}


def routes() -> list[Route]:
    """One for each file, so that any other path stays unknown."""
    return [Route(f"/{name}" if name != "index.html" else "/", _file) for name in FILES]


async def _file(request: Request) -> Response:
    name = request.url.path.removeprefix("/") or "index.html"
    return FileResponse(HERE / name, headers=HEADERS)
