"""The families of chat templates whose calls are known, and the one for all others."""

from octavo.serve.calls.families import gemma, hermes, internlm, llama, mistral, plain
from octavo.serve.calls.syntax import Syntax

FAMILIES = (hermes, mistral, internlm, gemma, llama)


def syntax_of(template: str) -> Syntax:
    """The syntax of calls that a chat template teaches."""
    return next((syntax for family in FAMILIES if (syntax := family.of(template))), plain.SYNTAX)
