"""litellm: completion whole and streamed, tools, JSON schema; by OpenAI's routes and Anthropic's."""

import json
import sys
from typing import Literal

import litellm
from pydantic import BaseModel

url, name = sys.argv[1:]
messages = [{"role": "user", "content": "How is the weather in Rome?"}]


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]


parameters = {**Weather.model_json_schema(), "additionalProperties": False}
tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
for provider, base in (("openai", f"{url}/v1"), ("hosted_vllm", f"{url}/v1"), ("anthropic", url)):
    asked = {"model": f"{provider}/{name}", "api_base": base, "api_key": "none", "messages": messages, "timeout": 300}
    short = {**asked, "max_tokens": 16, "temperature": 0}
    text = litellm.completion(**short).choices[0].message.content
    pieces = litellm.completion(**short, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    called = litellm.completion(**asked, tools=tools, tool_choice="required", max_tokens=300)
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Rome", "Paris")
    if provider != "anthropic":
        found = litellm.completion(**asked, response_format=Weather, max_tokens=300).choices[0].message.content
        assert Weather.model_validate_json(found)
