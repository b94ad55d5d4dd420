"""What all routes of completions share: sampling, streams, and the fields that other servers have for the same."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, create_model, model_validator

from octavo.engine.params import MAX_LOGPROBS, MAX_TOKENS, allowed
from octavo.engine.values import Biases, Kind, Number, Strings, Switch, TokenIds
from octavo.serve.requests.constraints import Constrained
from octavo.serve.requests.strict import Caller, Int31, Strict

# Taken, and without effect: what describes the caller to the provider, chooses among a provider's services, or tunes
# what is not here. The log says so once for each.
WITHOUT_EFFECT = {
    "user": "describes the caller",
    "safety_identifier": "describes the caller",
    "metadata": "describes the request",
    "store": "no answers are stored on this route",
    "service_tier": "there is one",
    "prediction": "answers are generated token by token",
    "verbosity": "the model was not trained on it",
    "prompt_cache_key": "prompts are found in the cache by their tokens",
    "prompt_cache_retention": "the cache keeps what it has room for",
    "cache_control": "prompts are found in the cache by their tokens",
    "cache_prompt": "prompts are always cached",
    "include_obfuscation": "streams are not padded",
    "guided_decoding_backend": "there is one",
    "guided_whitespace_pattern": "JSON is written in one form",
    "spaces_between_special_tokens": "texts are as the tokenizer decodes them",
}


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


def http(kind: Kind) -> Any:
    """What a row of the request parameters' table takes, for pydantic and OpenAPI. SamplingParams checks it again."""
    match kind:
        case Number(low, high, whole):
            return Annotated[int if whole else float, Field(ge=low, le=high)]
        case Switch():
            return bool
        case Strings(count, length):
            one: Any = Annotated[str, Field(min_length=1, max_length=length)]
            return one | Annotated[list[one], Field(max_length=count, fail_fast=True)]
        case TokenIds(count):
            return Int31 | Annotated[list[Int31], Field(max_length=count, fail_fast=True)]
        case Biases(low, high, count):
            key, bias = Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=low, le=high)]
            return Annotated[dict[key, bias], Field(max_length=count)]  # type: ignore[valid-type]
    raise TypeError(f"{type(kind).__name__} has no form over HTTP")


_rows: dict[str, Any] = {
    name: (http(rule.kind) | None, Field(None, description=rule.help)) for name, rule in allowed("HTTP").items()
}
_Table: Any = create_model("_Table", __base__=Constrained, **_rows)
_penalty = http(allowed("HTTP")["repetition_penalty"].kind)


class Sampling(_Table, Caller):
    """What both kinds of request share. Absent fields are the model's own defaults."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None

    # vLLM's
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    spaces_between_special_tokens: bool | None = None

    # llama.cpp's
    n_predict: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    repeat_penalty: _penalty | None = None  # type: ignore[valid-type]
    n_probs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    cache_prompt: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream=true")
        if self.best_of not in (None, 1, self.n or 1):
            raise ValueError("best_of: only as many as n; answers are not ranked")
        self._one_of("repetition_penalty", "repeat_penalty")
        return self

    def _one_of(self, *names: str) -> None:
        """Refuse a second name of the same thing."""
        given = list(self.given(names))
        if len(given) > 1:
            raise ValueError(f"{given[0]}: another name of {given[1]}; give one of them")

    def sampling(self, **more: Any) -> dict[str, Any]:
        """The fields of SamplingParams that the request sets."""
        given = self.given(allowed("HTTP").keys() - {"logprobs"})  # each kind of request has its own form of that
        if self.repeat_penalty is not None:
            given["repetition_penalty"] = self.repeat_penalty
        if self.n_predict is not None:
            given["max_tokens"] = MAX_TOKENS if self.n_predict == -1 else self.n_predict
        return given | self.constraint | {name: value for name, value in more.items() if value is not None}

    @property
    def names(self) -> dict[str, str]:
        """The request's own names of the parameters that it has another name for."""
        others = {"max_tokens": "n_predict", "repetition_penalty": "repeat_penalty"}
        used = {name: other for name, other in others.items() if self.given([other])}
        return used | {parameter: given for given, parameter, _ in self._given()}

    def delivery(self) -> dict[str, Any]:
        """The fields of GenerateRequest that say how answers are made and sent."""
        options = self.stream_options or StreamOptions()
        running = bool(options.include_usage and options.continuous_usage_stats)
        return {
            "n": self.n or 1,
            "stream": bool(self.stream),
            "usage": bool(options.include_usage),
            "running_usage": running,
            "id": self.request_id,
            "priority": self.priority or 0,
            "longest_prompt": self.truncate_prompt_tokens,
            "prompt_logprobs": self.prompt_logprobs,
            "names": self.names,
        }


def without_effect(given: Mapping[str, JsonValue] | JsonValue) -> set[str]:
    """The names in a body, of an object in it or of one in a list, that are taken and change nothing."""
    if isinstance(given, Mapping):
        own = {name for name, value in given.items() if name in WITHOUT_EFFECT and value is not None}
        parts = ("stream_options", "messages", "content")
        return own.union(*(without_effect(given[name]) for name in parts if name in given))
    if isinstance(given, list):
        return set().union(*(without_effect(one) for one in given if isinstance(one, dict)))
    return set()
