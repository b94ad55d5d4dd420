"""`POST /v1/chat/completions`."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from octavo.engine.params import MAX_TOKENS, TABLE
from octavo.serve.requests.generate import Conversation, GenerateRequest
from octavo.serve.requests.messages import ChatMessage
from octavo.serve.requests.sampling import Sampling, http
from octavo.serve.requests.tools import NamedTool, Tool, Tools

MAX_TOP = 20  # of top_logprobs, as at OpenAI


class ChatRequest(Sampling, Tools[Tool, NamedTool]):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: http(TABLE["max_tokens"].kind) | None = None  # type: ignore[valid-type]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: JsonValue = None
    verbosity: str | None = None

    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _fields_of_chats(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs=true")
        self._one_of("max_tokens", "max_completion_tokens", "n_predict")
        self._one_of("top_logprobs", "n_probs")
        if self.choice()["functions"] and self.constraint:
            raise ValueError("response_format: excludes calls of tools, unless tool_choice is none")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: excludes add_generation_prompt")
        return self

    def generate_request(self) -> GenerateRequest:
        """What it asks for, in the form that all routes share."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        conversation = Conversation(
            [message.plain() for message in self.messages],
            reply=not self.continue_final_message and self.add_generation_prompt is not False,
            go_on=bool(self.continue_final_message),
            variables=variables,
            **self.choice(),
        )
        logprobs = self.n_probs if self.n_probs else (self.top_logprobs or 0) if self.logprobs else None
        own = self.sampling(max_tokens=self.max_completion_tokens, logprobs=logprobs)
        return GenerateRequest([conversation], {"max_tokens": MAX_TOKENS} | own, **self.delivery())
