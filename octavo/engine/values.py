"""The kinds of values that a parameter of a request takes: what each accepts, says of itself, and makes of a value."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from reprlib import Repr
from typing import Any, Protocol

MAX_STOPS, MAX_STOP = 64, 1024  # stop strings, and characters of one: every token is compared with all of them
MAX_IDS = 1024

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class Kind(Protocol):
    """The values that a parameter takes."""

    @property
    def expected(self) -> str:
        """They in words, for "it must be …"."""

    def read(self, value: Any) -> Any:
        """`value` in its one form; raises ValueError for what is none, with the reason if there is one to tell."""


@dataclass(frozen=True)
class Number:
    """A number, bounds included. NaN, and True or False, are no numbers."""

    low: float
    high: float
    whole: bool = False

    @property
    def expected(self) -> str:
        kind = "whole number" if self.whole else "number"
        return f"a {kind} from {_shown(self.low)} to {_shown(self.high)}"

    def read(self, value: Any) -> Any:
        if not is_number(value, Integral if self.whole else Real):
            raise ValueError
        if not self.low <= value <= self.high:
            raise ValueError
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Switch:
    """True or False."""

    expected = "true or false"

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Strings:
    """A string, or several; read as a tuple."""

    count: int = MAX_STOPS
    length: int = MAX_STOP

    @property
    def expected(self) -> str:
        return f"a string or a list of strings, at most {self.count} of 1 to {self.length} characters"

    def read(self, value: Any) -> tuple[str, ...]:
        strings = (value,) if isinstance(value, str) else _listed(value, self.count)
        if not all(is_text(one) and 1 <= len(one) <= self.length for one in strings):
            raise ValueError
        return strings


@dataclass(frozen=True)
class Text:
    """One string."""

    length: int

    @property
    def expected(self) -> str:
        return f"a string of 1 to {self.length} characters"

    def read(self, value: Any) -> str:
        if not is_text(value) or not 1 <= len(value) <= self.length:
            raise ValueError
        return value


@dataclass(frozen=True)
class TokenIds:
    """A token id, or several; read as a tuple. The vocabulary is checked where the model is known."""

    count: int = MAX_IDS

    @property
    def expected(self) -> str:
        return f"a token id or a list of token ids, at most {self.count}"

    def read(self, value: Any) -> tuple[int, ...]:
        return tuple(_token(one) for one in ((value,) if isinstance(value, Integral) else _listed(value, self.count)))


@dataclass(frozen=True)
class Biases:
    """A number for each of several token ids, which may be written as strings, since keys in JSON are."""

    low: float
    high: float
    count: int = MAX_IDS

    @property
    def expected(self) -> str:
        bounds = f"{_shown(self.low)} to {_shown(self.high)}"
        return f'an object like {{"token id": bias}} of at most {self.count} numbers from {bounds}'

    def read(self, value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping) or len(value) > self.count:
            raise ValueError
        number = Number(self.low, self.high)
        return {_token(int(t) if _digits(t) else t): number.read(bias) for t, bias in value.items()}


@dataclass(frozen=True)
class Schema:
    """A JSON schema, which the grammar checks (octavo/grammars)."""

    expected = "a JSON schema, that is an object"

    def read(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        return value


def is_text(value: Any) -> bool:
    """Whether `value` is a string that a tokenizer can take: no half of a surrogate pair, as JSON allows."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def brief(value: Any) -> str:
    """A value in an error, however long it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__}"


def _listed(value: Any, most: int) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError
    several = tuple(value)
    if len(several) > most:
        raise ValueError
    return several


def is_number(value: Any, kind: type) -> bool:
    """Whether it is an Integral or Real, as `kind` says; to Python True is one too."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _digits(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10


def _token(value: Any) -> int:
    if not is_number(value, Integral) or not 0 <= value < 1 << 31:
        raise ValueError
    return int(value)


def _shown(bound: float) -> str:
    """A bound in words: powers of two are easier to read than their digits."""
    for shown, near in ((f"2^{n}", 1 << n) for n in (31, 63, 64)):
        if abs(bound) == near:
            return shown if bound > 0 else f"-{shown}"
        if bound == near - 1:
            return f"{shown} - 1"
    return f"{bound:g}".replace("e+", "e")
