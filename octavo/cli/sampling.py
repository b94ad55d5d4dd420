"""The options that say how answers are sampled, made from the table of request parameters."""

from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Annotated, Any

from octavo.cli.options import option
from octavo.engine.params import MAX_TOKENS, TABLE, SamplingParams, allowed
from octavo.engine.values import Kind, Number, Strings, Switch, TokenIds
from octavo.errors import OctavoError

GENERATE_ALONE = {"logprobs"}  # an option that `chat`, which shows text, does not have


def sampling_option(name: str) -> Any:
    """The option of a row of the request parameters' table."""
    rule = TABLE[name]
    flag = rule.flag or "--" + name.replace("_", "-")
    if isinstance(rule.kind, Switch):
        flag = f"{flag}/--no-{flag[2:]}"
    many = " May be repeated." if isinstance(rule.kind, Strings | TokenIds) else ""
    return option(rule.help + many, flag, panel="Sampling, by default as the model's generation config says")


def _value(kind: Kind) -> Any:
    """The type of an option's value."""
    match kind:
        case Number(whole=whole):
            return int if whole else float
        case Switch():
            return bool
        case Strings():
            return list[str]
        case TokenIds():
            return list[int]
    raise TypeError(f"{type(kind).__name__} has no form on the command line")


_Table: Any = make_dataclass(
    "_Table",
    [
        (name, Annotated[_value(rule.kind) | None, sampling_option(name)], None)
        for name, rule in allowed("command line").items()
        if name not in GENERATE_ALONE
    ],
)


@dataclass
class SamplingOptions(_Table):
    """What the command line says of the request parameters; None leaves one to the model's own generation config."""

    def given(self) -> dict[str, Any]:
        """The fields of SamplingParams that the command line sets."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in chosen.items() if value is not None and value != []}

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with what the command line sets; raises OctavoError for what makes no sense."""
        given = self.given()
        chosen = replace(defaults, **given)
        cuts = [name for name in ("top_k", "top_p", "min_p") if given.get(name)]
        if cuts and "temperature" not in given and chosen.temperature == 0:
            flag = "--" + cuts[0].replace("_", "-")
            raise OctavoError(
                f"{flag} changes nothing: this model is greedy by default; give a --temperature above 0 too"
            )
        return chosen

    def check(self) -> None:
        """Raise OctavoError for values that no model's defaults can mend, before a model is loaded."""
        self.params(SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS))
