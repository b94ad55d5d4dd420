"""The server's log: a line for each request, and what goes wrong, at most one line of a kind a minute. Lines are short,
and without what clients sent."""

import logging
import sys
import time
import traceback
import warnings

LONGEST = 2048  # bytes of a line
PERIOD = 60.0  # seconds in which of one kind one line is written
WARNINGS = "py.warnings"  # all of Python's, which one line below writes
REQUESTS = "octavo.requests"  # a line of these is written for each
KINDS = 256  # that are remembered
# What these say comes from the system or from torch. Other errors may quote what they were given, a prompt among it.
TELLING = (OSError, MemoryError, RuntimeError, AssertionError)


def start(prompts: bool = False, level: str = "info", requests: bool = True) -> None:
    """Send all that is logged or warned of in this process to stderr, in this form: ours from `level` on, of the
    libraries warnings alone. With `prompts`, errors are written with all they say; with `requests`, a line for each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line(prompts))
    handler.addFilter(Rarely())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    told = logging.getLogger(WARNINGS)
    warnings.showwarning = lambda message, *_, **__: told.warning("%s", str(message))  # without the source it is in
    for name in ("transformers", "uvicorn", "uvicorn.error"):  # they bring handlers of their own
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.getLogger("octavo").setLevel(level.upper())
    logging.getLogger(REQUESTS).disabled = not requests


class Line(logging.Formatter):
    """`time LEVEL logger: message`, and of an error its kind and where it came from, in one line."""

    def __init__(self, prompts: bool):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.prompts = prompts

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().strip()
        # Further lines of the libraries' messages show the objects they speak of.
        line = logging.makeLogRecord(
            record.__dict__ | {"msg": message.partition("\n")[0], "args": (), "exc_info": None}
        )
        text = super().format(line)
        if more := getattr(record, "more", 0):
            text += f" ({more} more since the last such line)"
        if record.exc_info and record.exc_info[1]:
            text += f": {self._error(record.exc_info[1])}"
        text = text.replace("\n", " ")
        encoded = text.encode("utf-8", "replace")
        return text if len(encoded) <= LONGEST else encoded[: LONGEST - 3].decode("utf-8", "ignore") + "…"

    def _error(self, error: BaseException) -> str:
        says = f": {str(error)[:400]}" if self.prompts or isinstance(error, TELLING) else ""
        frames = traceback.extract_tb(error.__traceback__)
        where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        return f"{type(error).__name__}{says} at {where}"


class Rarely(logging.Filter):
    """Lets one record of a kind through in a minute: what clients cause must not fill a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[tuple[object, ...], float] = {}
        self.left_out: dict[tuple[object, ...], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == REQUESTS:
            return True
        error = type(record.exc_info[1]) if record.exc_info else None
        kind = (
            record.name,
            record.levelno,
            record.pathname,
            record.lineno,
            error,
            record.name == WARNINGS and record.args,
            getattr(record, "kind", None),
        )
        now = time.monotonic()
        if now - self.written.get(kind, -PERIOD) < PERIOD:
            self.left_out[kind] = self.left_out.get(kind, 0) + 1
            return False
        if len(self.written) >= KINDS:
            self.written.clear()
            self.left_out.clear()
        self.written[kind] = now
        record.more = self.left_out.pop(kind, 0)
        return True
