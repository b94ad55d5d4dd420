"""Calls of functions: how models write them, how they are read as they come, how answers are held to their schemas.

Every family of chat templates has a syntax of its own (families.py); `syntax_of` tells it by the template.
"""

from octavo.serve.calls.constrained_reader import ConstrainedReader
from octavo.serve.calls.families import PLAIN, syntax_of
from octavo.serve.calls.free_reader import FreeReader
from octavo.serve.calls.grammar import calls_grammar
from octavo.serve.calls.reader import CallDelta, Reader
from octavo.serve.calls.syntax import Syntax

__all__ = ["PLAIN", "CallDelta", "ConstrainedReader", "FreeReader", "Reader", "Syntax", "calls_grammar", "syntax_of"]
