"""Values that match a JSON schema, in Gemma's form: a grammar as Lark writes it.

Strings stand between two quotes that are tokens of their own, and nothing in them is escaped; keys have no quotes and
come in the order of the alphabet; there is no white space. Numbers, true, false and null are as in JSON.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from octavo.errors import OctavoError
from octavo.grammars.size import measure_schema
from octavo.grammars.sources import json_rule, literal

MOST_ITEMS = 64  # of a list whose schema sets no bound
NUMBERS = ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
KEY = r"/[^\s:{}\[\],<>\"]{1,64}/"
DATE, TIME = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", r"([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]{1,9})?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}(Z|[+-][0-9]{{2}}:[0-9]{{2}})",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){1,4}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])",
}


def rules(name: str, schema: Mapping[str, Any], text: Callable[[str], str], quote: str) -> list[str]:
    """The rule `name`, and those that it needs. `text` writes a text as a part of the grammar. Raises OctavoError for
    what a schema asks for and this form has no rule for."""
    measure_schema(schema)
    return _Rules(name, schema, text, quote).lines


class _Rules:
    def __init__(self, name: str, schema: Mapping[str, Any], text: Callable[[str], str], quote: str):
        self.name, self.schema = name, schema
        self.quote = text(quote)
        # Within a string: anything, where the quote is a token; else all but the sign that it begins with.
        self.sign = "(.|\\n)" if self.quote.startswith("<[") else f"[^{re.escape(quote[0])}]"
        self.lines: list[str] = []
        self.named: dict[str, str] = {}  # rules by what they are for
        self._rule(name, self._value(schema))

    def _rule(self, name: str, value: str) -> str:
        self.lines.append(f"{name}: {value}")
        return name

    def _part(self, key: str, value: Callable[[], str]) -> str:
        """The rule that is for `key`, which may refer to itself."""
        if key not in self.named:
            self.named[key] = f"{self.name}_{len(self.named)}"
            self._rule(self.named[key], value())
        return self.named[key]

    def _value(self, schema: Any) -> str:
        """What a value of the schema may be."""
        if schema is True or schema == {}:
            return self._part("any", self._any)
        if not isinstance(schema, Mapping):
            raise _refused("a part of it is no schema")
        if (reference := schema.get("$ref")) is not None:
            return self._part(f"$ref {reference}", lambda: self._value(self._referred(reference)))
        if "const" in schema or "enum" in schema:
            constants = [schema["const"]] if "const" in schema else schema["enum"]
            return self._either([self._constant(value) for value in constants])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._either([self._value(one) for one in schema[key]])
        if "allOf" in schema:
            return self._value(_merged(schema))
        kind = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None)
        if isinstance(kind, list):
            return self._either([self._value({**schema, "type": one}) for one in kind])
        match kind:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._string(schema)
            case "integer" | "number":
                return json_rule({"type": kind} | {key: schema[key] for key in NUMBERS if key in schema})
            case "boolean":
                return '("true" | "false")'
            case "null":
                return '"null"'
            case None:
                return self._part("any", self._any)
        raise _refused(f"there is no type {kind!r}")

    def _any(self) -> str:
        own = self.named["any"]
        pair, more = f'{KEY} ":" {own}', MOST_ITEMS - 1
        composed = [f'"{{" ({pair} ("," {pair}){{0,{more}}})? "}}"', f'"[" ({own} ("," {own}){{0,{more}}})? "]"']
        plain = [self._string({}), json_rule({"type": "number"}), '"true"', '"false"', '"null"']
        return self._either([*plain, *composed])

    def _string(self, schema: Mapping[str, Any]) -> str:
        if (pattern := schema.get("pattern") or FORMATS.get(schema.get("format", ""))) is not None:
            inside = _searched(pattern, self.sign) if "pattern" in schema else pattern
        elif "minLength" in schema or "maxLength" in schema:
            inside = f"{self.sign}{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
        else:
            inside = f"{self.sign}*"
        return f"({self.quote} /{inside}/ {self.quote})"

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems", max(MOST_ITEMS, schema.get("minItems", 0)))
        if first := [self._value(one) for one in schema.get("prefixItems", ())]:
            return " ".join(['"["', ' "," '.join(first), '"]"'])
        item = self._value(schema.get("items", True))
        if most < 1:
            return '"[" "]"'
        items = f'{item} ("," {item}){{{max(0, least - 1)},{most - 1}}}'
        return f'"[" {items} "]"' if least else f'"[" ({items})? "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties: Mapping[str, Any] = schema.get("properties") or {}
        required, extra = set(schema.get("required", ())), schema.get("additionalProperties", not properties)
        if missing := required - properties.keys():
            raise _refused(f"{sorted(missing)[0]!r} is required, and no property")
        pairs = [
            (f"{literal(f'{key}:')} {self._value(properties[key])}", key in required)
            for key in sorted(properties, key=str.lower)
        ]
        others = f'{KEY} ":" {self._value(extra)}' if extra is not False else ""
        # What may follow from each property on, after another one, is a rule; before the first one there is no comma.
        following = self._rule(self._new(), f'("," {others}){{0,{MOST_ITEMS}}}') if others else ""
        begun = [f"{others} {following}"] if others else []
        optional = True
        for pair, needed in reversed(pairs):
            begun = [f"{pair} {following}", *(begun if not needed else ())]
            optional &= not needed
            after = f'"," {pair}' if needed else f'("," {pair})?'
            following = self._rule(self._new(), f"{after} {following}")
        inside = self._either(begun)
        return f'"{{" {inside}{"?" if optional else ""} "}}"' if begun else '"{" "}"'

    def _new(self) -> str:
        return f"{self.name}_o{len(self.lines)}"

    def _constant(self, value: Any) -> str:
        match value:
            case str():
                return f"{self.quote} {literal(value)} {self.quote}" if value else f"{self.quote} {self.quote}"
            case Mapping():
                pairs = [f"{literal(f'{key}:')} {self._constant(value[key])}" for key in sorted(value, key=str.lower)]
                return " ".join(['"{"', ' "," '.join(pairs), '"}"'])
            case list():
                return " ".join(['"["', ' "," '.join(map(self._constant, value)), '"]"'])
        return json_rule({"const": value})

    def _either(self, values: list[str]) -> str:
        if not values:
            raise _refused("a part of it has no value")
        return f"({' | '.join(values)})"

    def _referred(self, reference: Any) -> Any:
        part: Any = self.schema
        for step in str(reference).removeprefix("#").split("/")[1:]:
            part = part.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(part, Mapping) else None
        if part is None or not str(reference).startswith("#"):
            raise _refused(f"there is no {reference}")
        return part


def _merged(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema and those of its `allOf`, as one; each may set a keyword, and all of them properties."""
    merged: dict[str, Any] = {}
    for part in ({key: value for key, value in schema.items() if key != "allOf"}, *schema["allOf"]):
        if not isinstance(part, Mapping) or "$ref" in part or "allOf" in part:
            raise _refused("allOf has references, or allOf, in it")
        for key, value in part.items():
            if key == "properties":
                merged[key] = {**merged.get(key, {}), **value}
            elif key == "required":
                merged[key] = [*merged.get(key, ()), *value]
            elif merged.setdefault(key, value) != value:
                raise _refused(f"its allOf differ in {key}")
    return merged


def _searched(pattern: str, sign: str) -> str:
    """The expression that whole strings match, of one that is looked for anywhere in them."""
    begun, ended = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begun : len(pattern) - ended]
    whole = f"{'' if begun else f'{sign}*'}({inner}){'' if ended else f'{sign}*'}"
    return re.sub(r"(?<!\\)/", r"\\/", whole)


def _refused(why: str) -> OctavoError:
    return OctavoError(f"the parameters of a function cannot be served: {why}", "json_schema")
