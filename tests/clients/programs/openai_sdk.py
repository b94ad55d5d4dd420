"""openai: chat, streams, tools, structured outputs, completions, responses."""

import sys
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
messages = [{"role": "user", "content": "How is the weather in Rome?"}]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Paris"]


assert model in [one.id for one in client.models.list()]
assert client.models.retrieve(model).id == model

answer = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
pieces = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0, stream=True)
text = answer.choices[0].message.content
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text

parsed = client.chat.completions.parse(model=model, messages=messages, response_format=Weather)
assert parsed.choices[0].message.parsed.city in ("Rome", "Paris")

function = {"name": "weather", "parameters": {**Weather.model_json_schema(), "additionalProperties": False}}
tools = [{"type": "function", "function": {**function, "strict": True}}]
said = (
    client.chat.completions.create(
        model=model, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    .choices[0]
    .message
)
assert all(Weather.model_validate_json(call.function.arguments) for call in said.tool_calls)
results = [{"role": "tool", "tool_call_id": call.id, "content": "Sunny"} for call in said.tool_calls]
client.chat.completions.create(model=model, messages=[*messages, said, *results], tools=tools, max_tokens=16)
with client.chat.completions.stream(
    model=model, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
) as stream:
    streamed = stream.get_final_completion().choices[0].message.tool_calls
assert all(call.function.name == "weather" for call in streamed)

whole = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, logprobs=2)
assert len(whole.choices[0].logprobs.tokens) <= 8

first = client.responses.create(model=model, input="How is the weather?", max_output_tokens=16, temperature=0)
assert first.output_text
again = client.responses.create(model=model, input="And tomorrow?", previous_response_id=first.id, max_output_tokens=16)
assert again.previous_response_id == first.id
with client.responses.stream(model=model, input="How is the weather?", max_output_tokens=16, temperature=0) as stream:
    assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == first.output_text
assert client.responses.parse(model=model, input="Weather?", text_format=Weather).output_parsed.city
called = client.responses.create(
    model=model,
    input="Weather?",
    tools=[{"type": "function", **function}],
    tool_choice="required",
    parallel_tool_calls=False,
)
assert called.output[0].type == "function_call"
