"""Any other template: the answer is JSON, one call or a list of them, as OpenAI's API names their parts."""

from octavo.serve.calls.syntax import Syntax

SYNTAX = Syntax(family="plain JSON", bare=True, joint=None)
