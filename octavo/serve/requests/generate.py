"""The one value that every route's request is translated into, and that all behind the routes reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.text import Message


@dataclass(frozen=True)
class Conversation:
    """A prompt that the model's chat template makes of messages."""

    messages: Sequence[Message]  # as chat templates know them: {"role", "content", "tool_calls", …}
    functions: Sequence[Mapping[str, Any]] = ()  # {"name", "description", "parameters", "strict"} that may be called
    must_call: bool = False  # the answer is a call, or several
    only: str | None = None  # the one function that must be called, once
    parallel: bool = True  # whether one answer may hold several calls
    reply: bool = True  # whether the template opens the model's turn
    go_on: bool = False  # the answer continues the last message
    variables: Mapping[str, Any] = field(default_factory=dict)  # more that the template reads

    @property
    def text(self) -> str:
        return "".join(message.get("content") or "" for message in self.messages)


Prompt = str | list[int] | Conversation


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts, and what is wanted of the answers to each."""

    prompts: Sequence[Prompt]
    sampling: Mapping[str, Any]  # the fields of SamplingParams that it sets; the others are the model's own
    n: int = 1  # answers to each prompt
    stream: bool = False
    usage: bool = False  # a stream ends with its usage
    running_usage: bool = False  # and every piece of it tells what there is so far
    id: str | None = None  # in place of a random one
    priority: int = 0  # among the client's own requests; lower ones come first
    special_tokens: bool = True  # the tokenizer puts BOS and the like before a text
    longest_prompt: int | None = None  # tokens of a prompt that are kept, its last ones
    names: Mapping[str, str] = field(default_factory=dict)  # the request's own names of fields of `sampling`
    prompt_logprobs: int | None = None  # log-probabilities of each token of the prompt, and of so many likeliest

    @property
    def choices(self) -> int:
        """The number of answers."""
        return self.n * len(self.prompts)
