"""Answers that match a JSON schema, a regular expression, one of several texts, or a grammar."""

from octavo.grammars.guides import Grammars

__all__ = ["Grammars"]
