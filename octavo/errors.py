"""What goes wrong by the user's hand: one sentence that names the thing and the remedy, shown without a traceback."""


class OctavoError(Exception):
    """Bad input. The command line prints the message alone and exits with status 2. `field` is the parameter of the
    request that is at fault, if it is one, and `code` names a fault that programs tell from others."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.field, self.code = field, code


class Unsupported(OctavoError):
    """A model or option Octavo does not handle. Raised at load: nothing is accepted and then ignored."""


def one_line(error: Exception) -> str:
    """The first line of what an error of another library says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
