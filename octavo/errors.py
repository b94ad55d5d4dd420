"""What goes wrong by the user's hand: one sentence that names the thing and the remedy, shown without a traceback."""


class OctavoError(Exception):
    """Bad input. The command line prints the message alone and exits with status 2."""


class Unsupported(OctavoError):
    """A model or option Octavo does not handle. Raised at load: nothing is accepted and then ignored."""
