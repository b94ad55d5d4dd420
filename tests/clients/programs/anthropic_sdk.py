"""anthropic: messages whole and streamed, a tool and its result, tokens counted."""

import sys

from anthropic import Anthropic, BadRequestError

url, model = sys.argv[1:]
client = Anthropic(base_url=url, api_key="none", timeout=300)
messages = [{"role": "user", "content": "How is the weather in Rome?"}]
asked = {
    "model": model,
    "messages": messages,
    "max_tokens": 16,
    "system": "Be terse.",
    "extra_body": {"temperature": 0},
}

message = client.messages.create(**asked)
with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream) == message.content[0].text
    assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
count = client.messages.count_tokens(model=model, messages=messages, system="Be terse.").input_tokens
assert count == message.usage.input_tokens + message.usage.cache_read_input_tokens

city = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
tools = [{"name": "weather", "description": "The weather in a city.", "input_schema": city}]
choice = {"type": "any", "disable_parallel_tool_use": True}
said = client.messages.create(model=model, messages=messages, max_tokens=300, tools=tools, tool_choice=choice)
(use,) = said.content
assert use.input["city"] in ("Rome", "Paris")
with client.messages.stream(model=model, messages=messages, max_tokens=300, tools=tools, tool_choice=choice) as stream:
    assert stream.get_final_message().content[0].input["city"] in ("Rome", "Paris")
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Sunny"}]}
history = [*messages, {"role": "assistant", "content": said.content}, result]
assert client.messages.create(model=model, messages=history, max_tokens=16, tools=tools).usage.output_tokens

refused = ""
try:
    client.messages.create(model=model, messages=messages, max_tokens=1, tool_choice={"type": "any"})
except BadRequestError as error:
    refused = str(error)
assert "no tools" in refused
