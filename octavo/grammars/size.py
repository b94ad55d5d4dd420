"""How much a JSON schema asks for, measured before anything is compiled from it.

Compiling takes time in the square of a schema's size, and a few characters can ask for much: `a{100000}`, a
`multipleOf` with eight digits, a chain of references. Each limit here is one that schemas in use stay far below (OpenAI
takes 5,000 properties in all, and 15,000 characters of a list of 250 values), and that keeps compiling below a second
or two.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from octavo.errors import OctavoError

MAX_VALUES = 5_000  # objects, lists, strings, numbers in a schema
MAX_DEPTH = 64  # of them within each other
MAX_CHARACTERS = 1 << 17  # of its strings and names
MAX_BRANCHES = 500  # parts of one `properties`, `anyOf` and the like: what may come at one place
MAX_REPETITIONS = 2_000  # characters and classes in all patterns, each as often as it is repeated
MAX_MULTIPLE = 10_000  # of `multipleOf`, its decimal point left out; all of a schema's multiplied: a million
BRANCHING = {"properties", "patternProperties", "dependentSchemas", "anyOf", "oneOf", "allOf", "prefixItems"}
QUANTIFIER = re.compile(r"\{(\d+)(?:,(\d*))?\}")
ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)


def measure_schema(schema: Mapping[str, Any]) -> None:
    """Raise OctavoError, naming the limit, for a schema that is beyond one."""
    values = characters = repetitions = 0
    multiples: set[int] = set()
    todo: list[tuple[Any, int]] = [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        values += 1
        _expect(depth <= MAX_DEPTH, f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                characters += len(key) if isinstance(key, str) else 0
                if key in BRANCHING and isinstance(part, Mapping | list):
                    _expect(len(part) <= MAX_BRANCHES, f"one {key} has more than {MAX_BRANCHES} parts")
                if key == "pattern" and isinstance(part, str):
                    repetitions += regex_size(part)
                if key == "patternProperties" and isinstance(part, Mapping):
                    repetitions += sum(regex_size(pattern) for pattern in part if isinstance(pattern, str))
                if key == "multipleOf" and isinstance(part, int | float):
                    multiples.add(_digits(part))
            todo += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list | tuple):
            todo += [(part, depth + 1) for part in value]
        _expect(values + len(todo) <= MAX_VALUES, f"it has more than {MAX_VALUES} values")
        _expect(characters <= MAX_CHARACTERS, f"it has more than {MAX_CHARACTERS} characters")
        _expect(repetitions <= MAX_REPETITIONS, f"its patterns repeat more than {MAX_REPETITIONS} characters")
    product = 1
    for multiple in multiples:
        _expect(multiple <= MAX_MULTIPLE, f"a multipleOf has more states than {MAX_MULTIPLE}")
        product *= multiple
    _expect(product <= MAX_MULTIPLE * 100, f"its multipleOf have more states together than {MAX_MULTIPLE * 100}")


def least_size(schema: Any) -> int:
    """Characters that the shortest value of a schema may take, or of any part of it: an upper bound, as far as one can
    be told without solving the schema."""
    largest, depth, known, seen = 0, 0, dict[str, int](), dict[int, int]()

    def least(part: Any) -> int:
        nonlocal depth
        if not isinstance(part, Mapping) or depth > MAX_DEPTH:
            return 2
        if id(part) not in seen:
            depth += 1
            seen[id(part)] = _least(part)
            depth -= 1
        return seen[id(part)]

    def _least(part: Mapping[str, Any]) -> int:
        nonlocal largest
        if isinstance(reference := part.get("$ref"), str):
            if reference not in known:
                known[reference] = 0  # what refers to itself need not
                known[reference] = least(_resolve(schema, reference))
            return known[reference]
        size = _constant(part) + len(str(part.get("pattern", ""))) + 40 * ("format" in part)
        size += _count(part.get("minLength")) + 8 * _count(part.get("minProperties"))
        size += _count(part.get("minItems")) * (2 + least(part.get("items", {})))
        size += sum(2 + least(one) for one in _listed(part.get("prefixItems")))
        size += sum(least(one) for one in _listed(part.get("allOf")))
        size += max((least(one) for key in ("anyOf", "oneOf") for one in _listed(part.get(key))), default=0)
        required, properties = _listed(part.get("required")), part.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        size += sum(len(str(name)) + 6 + least(properties.get(name, {})) for name in required)
        largest = max(largest, size, *(least(one) for one in properties.values()), 0)
        return 2 + size

    return max(least(schema), largest) + 8


def _constant(part: Mapping[str, Any]) -> int:
    given = [part["const"]] if "const" in part else _listed(part.get("enum"))
    numbers = [part[key] for key in ("minimum", "maximum", "exclusiveMinimum", "multipleOf") if key in part]
    return max((len(str(value)) + 2 for value in (*given, *numbers)), default=0)


def _resolve(schema: Any, reference: str) -> Any:
    for name in reference.removeprefix("#").split("/")[1:]:
        schema = schema.get(name) if isinstance(schema, Mapping) else None
    return schema


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 < value < 1 << 31 else 0


def regex_size(pattern: str) -> int:
    """Characters and classes of a pattern, each as often as its `{n}` repeat it: about what compiling it costs.
    Raises OctavoError where its groups are nested too deep."""
    sizes, last = [0], 0  # of every open group, and of the atom that a quantifier would repeat
    at = 0
    while at < len(pattern):
        if quantifier := QUANTIFIER.match(pattern, at):
            most = max(int(number[:9]) for number in quantifier.groups() if number)
            sizes[-1] += last * max(0, most - 1)
            last *= max(1, most)
            at = quantifier.end()
            continue
        atom = ATOM.match(pattern, at)
        assert atom is not None
        at = atom.end()
        if atom[0] == "(":
            sizes.append(0)
            _expect(len(sizes) <= MAX_DEPTH, f"a pattern's groups are nested more than {MAX_DEPTH} deep")
        elif atom[0] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif atom[0] not in "*+?|":
            last = 1
            sizes[-1] += 1
        if sizes[-1] > MAX_REPETITIONS:
            return sizes[-1]
    return sum(sizes)


def _digits(number: float) -> int:
    """A number without its decimal point and the zeros at its ends."""
    value = Decimal(str(number))
    return int("".join(map(str, value.as_tuple().digits)).strip("0") or "0") if value.is_finite() else 0


def _expect(kept: bool, why: str) -> None:
    if not kept:
        raise OctavoError(f"the JSON schema cannot be served: {why}", "json_schema")
