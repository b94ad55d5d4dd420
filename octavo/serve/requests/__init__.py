"""What may be asked: the requests of each route, field by field, and their translation into one value (generate.py).

A field that is not here is refused by name, as is a value of the wrong type. The fields of sampling are made from the
table of request parameters (engine/params.py).
"""

from octavo.serve.requests.chat import ChatRequest
from octavo.serve.requests.completions import CompletionRequest
from octavo.serve.requests.parsing import parse

__all__ = ["ChatRequest", "CompletionRequest", "parse"]
