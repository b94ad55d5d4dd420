"""`POST /v1/completions`."""

from typing import Self, cast

from pydantic import model_validator

from octavo.serve.requests.generate import GenerateRequest
from octavo.serve.requests.sampling import Sampling
from octavo.serve.requests.strict import Int31

SIXTEEN = 16  # tokens of an answer, as OpenAI's reference has it


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[Int31] | list[list[Int31]]
    echo: bool | None = None
    suffix: None = None
    add_special_tokens: bool | None = None  # vLLM's

    @model_validator(mode="after")
    def _fields_of_completions(self) -> Self:
        if not self.prompt:
            raise ValueError("prompt: is empty")
        self._one_of("max_tokens", "n_predict")
        self._one_of("logprobs", "n_probs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], [self.prompt] if one else self.prompt)

    def generate_request(self) -> GenerateRequest:
        """What it asks for, in the form that all routes share."""
        logprobs = self.n_probs if self.n_probs else self.logprobs
        own = {"max_tokens": SIXTEEN} | self.sampling(logprobs=logprobs)
        delivery = self.delivery()
        if self.echo and logprobs is not None and self.prompt_logprobs is None:
            delivery["prompt_logprobs"] = logprobs
        return GenerateRequest(self.prompts, own, special_tokens=self.add_special_tokens is not False, **delivery)
