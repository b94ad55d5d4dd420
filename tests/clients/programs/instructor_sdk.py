"""instructor: a model of pydantic from an answer, by tools and by JSON schema, whole and as it grows."""

import sys
from typing import Literal

import instructor
from instructor.dsl.partial import PartialLiteralMixin
from openai import OpenAI
from pydantic import BaseModel

url, name = sys.argv[1:]


class Weather(
    BaseModel, PartialLiteralMixin, extra="forbid"
):  # a small model would write properties of its own for ever
    """The weather in a city."""

    city: Literal["Rome", "Paris"]


openai = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
messages = [{"role": "user", "content": "How is the weather in Rome?"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai, mode=mode)
    asked = {"model": name, "messages": messages, "response_model": Weather, "max_tokens": 300, "max_retries": 0}
    assert client.chat.completions.create(**asked).city in ("Rome", "Paris")
    *_, last = client.chat.completions.create_partial(**asked)
    assert last.city in ("Rome", "Paris")
