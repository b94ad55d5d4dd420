"""What a request may ask for: one table, from which everything that reads requests is made.

`SamplingParams` is the table. The annotation of each field is its `Rule`: which values it takes (values.py), what it
means and where it may be given. From it come the checks of `SamplingParams` itself, the options of `octavo generate`
and `octavo chat` (cli/sampling.py), the lines of an --input file (jsonl.py), the HTTP model (serve/requests/) and
docs/PARAMETERS.md (scripts/parameters.py).

It is a dataclass and no pydantic model: nothing has to be imported for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Self, get_type_hints

from octavo.engine.values import Biases, Kind, Number, Schema, Strings, Switch, Text, TokenIds, brief
from octavo.errors import OctavoError

Place = Literal["Python", "command line", "JSON lines", "HTTP"]
EVERYWHERE: tuple[Place, ...] = ("Python", "command line", "JSON lines", "HTTP")
BY_NAME: tuple[Place, ...] = ("Python", "JSON lines", "HTTP")  # what no option of a command can spell

MAX_TOKENS = (1 << 31) - 1
MAX_LOGPROBS = 100
MAX_CHOICES = 500
MAX_GRAMMAR = 1 << 18  # characters
CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")  # what answers may be made to match, one of them


@dataclass(frozen=True)
class Rule:
    """A row of the table. `flag` is the option's name on the command line, where it is not the parameter's own."""

    kind: Kind
    help: str
    where: tuple[Place, ...] = EVERYWHERE
    flag: str | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of an answer are chosen, where it ends and what of it is shown. Greedy by default: the same prompt
    gives the same answer. Raises OctavoError with the name of the parameter for a value that its rule does not take."""

    max_tokens: Annotated[int, Rule(Number(1, MAX_TOKENS, whole=True), "The longest answer, in tokens.")] = 256
    min_tokens: Annotated[
        int,
        Rule(
            Number(0, MAX_TOKENS, whole=True),
            "Tokens before which neither the model's own end, a stop token nor a stop string ends the answer.",
        ),
    ] = 0
    temperature: Annotated[
        float, Rule(Number(0, 1e30), "Higher is more random; 0 is greedy, always the most likely token.")
    ] = 0.0
    top_k: Annotated[
        int, Rule(Number(-1, MAX_TOKENS, whole=True), "Draw from the k most likely tokens; 0 and -1 are off.")
    ] = 0
    top_p: Annotated[
        float, Rule(Number(0, 1), "Draw from the most likely tokens that hold this share; 1 is off, 0 is greedy.")
    ] = 1.0
    min_p: Annotated[
        float, Rule(Number(0, 1), "Least probability, as a share of the most likely token's; 0 is off.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Rule(Number(1e-3, 1e3), "Against the tokens of prompt and answer; 1 is off.")
    ] = 1.0
    presence_penalty: Annotated[
        float, Rule(Number(-2, 2), "Taken off the logit of every token of the answer so far; 0 is off.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Rule(Number(-2, 2), "The same, times how often the token has appeared; 0 is off.")
    ] = 0.0
    logit_bias: Annotated[
        Mapping[int, float], Rule(Biases(-100, 100), "For token ids, what is added to their logits.", BY_NAME)
    ] = field(default_factory=dict, hash=False)
    seed: Annotated[
        int | None,
        Rule(Number(-(1 << 63), (1 << 64) - 1, whole=True), "The same seed draws the same answer; taken modulo 2^64."),
    ] = None
    stop: Annotated[tuple[str, ...], Rule(Strings(), "Strings that end the answer; they may name special tokens.")] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], Rule(TokenIds(), "Token ids that end the answer.", flag="--stop-token-id")
    ] = ()
    include_stop_str_in_output: Annotated[
        bool, Rule(Switch(), "Keep the stop string, or the text of the token that ended the answer, in its text.")
    ] = False
    ignore_eos: Annotated[bool, Rule(Switch(), "Go on beyond the model's own end; for measurements.")] = False
    skip_special_tokens: Annotated[bool, Rule(Switch(), "Leave special tokens out of the text.")] = True
    logprobs: Annotated[
        int | None,
        Rule(
            Number(0, MAX_LOGPROBS, whole=True),
            "Log-probabilities of each token, and of the so many most likely ones.",
        ),
    ] = None
    json_schema: Annotated[
        Mapping[str, Any] | None,
        Rule(Schema(), "The answer is JSON that matches it (over HTTP: response_format).", ("Python", "JSON lines")),
    ] = field(default=None, hash=False)
    regex: Annotated[
        str | None,
        Rule(Text(MAX_GRAMMAR), "The answer matches this regular expression, all of it.", ("Python", "JSON lines")),
    ] = None
    choice: Annotated[
        tuple[str, ...] | None,
        Rule(Strings(MAX_CHOICES), "The answer is one of these strings.", ("Python", "JSON lines")),
    ] = None
    grammar: Annotated[
        str | None,
        Rule(
            Text(MAX_GRAMMAR),
            "The answer matches this grammar, in Lark's form (llguidance's) or GBNF (llama.cpp's).",
            ("Python", "JSON lines"),
        ),
    ] = None

    def __post_init__(self) -> None:
        for name, rule in TABLE.items():
            value = getattr(self, name)
            if value is None and DEFAULTS[name] is None:
                continue
            try:
                value = rule.kind.read(value)
            except (ValueError, TypeError):
                raise OctavoError(f"{name} is {brief(value)}; it must be {rule.kind.expected}", name) from None
            object.__setattr__(self, name, value)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if self.top_p == 0:
            object.__setattr__(self, "top_p", 1.0)
            object.__setattr__(self, "temperature", 0.0)
        if self.seed is not None:
            object.__setattr__(self, "seed", self.seed % (1 << 64))
        if self.min_tokens > self.max_tokens:
            raise OctavoError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}", "min_tokens"
            )
        if constraint := self.constraint:
            others = [name for name in CONSTRAINTS if name != constraint and getattr(self, name) is not None]
            if others:
                raise OctavoError(f"{constraint} and {others[0]} exclude each other: give one of them", constraint)
            if self.ignore_eos or self.min_tokens:
                other = "ignore_eos" if self.ignore_eos else "min_tokens"
                raise OctavoError(f"{constraint} and {other} exclude each other: it has an end", constraint)

    @classmethod
    def of_model(cls, settings: Mapping[str, Any], temperature: float = 0.0) -> Self:
        """What a model's generation_config.json asks for. One that does not sample has that `temperature`, unless a
        temperature or a top-p of 0 says that it is greedy."""
        greedy = 0 in (settings.get("temperature"), settings.get("top_p"))
        if greedy or not settings.get("do_sample"):
            kept = {name: settings.get(name) for name in ("max_new_tokens", "repetition_penalty")}
            settings = kept | {"temperature": 0.0 if greedy else temperature}
        return cls(
            max_tokens=settings.get("max_new_tokens") or cls.max_tokens,
            temperature=settings.get("temperature", 1.0),
            top_k=settings.get("top_k") or 0,
            top_p=settings.get("top_p") or 1.0,
            min_p=settings.get("min_p") or 0.0,
            repetition_penalty=settings.get("repetition_penalty") or 1.0,
        )

    @property
    def constraint(self) -> str | None:
        """The name of what the answer is to match, if there is such."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)


def _rule(annotation: Any) -> Rule:
    return next(part for part in annotation.__metadata__ if isinstance(part, Rule))


TABLE: dict[str, Rule] = {
    name: _rule(annotation) for name, annotation in get_type_hints(SamplingParams, include_extras=True).items()
}
DEFAULTS: dict[str, Any] = {f.name: {} if f.name == "logit_bias" else f.default for f in fields(SamplingParams)}


def allowed(place: Place) -> dict[str, Rule]:
    """The rows of the table for one place, by their names."""
    return {name: rule for name, rule in TABLE.items() if place in rule.where}
