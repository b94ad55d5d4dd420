"""haystack: a chat generator whole and streamed, in a pipeline, with a tool."""

import sys

from haystack import Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

url, name = sys.argv[1:]
common = {"model": name, "api_base_url": f"{url}/v1", "api_key": Secret.from_token("none"), "timeout": 300}
short = {"max_tokens": 16, "temperature": 0}


def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}"


asked = [ChatMessage.from_user("How is the weather in {{ city }}?")]
pipeline = Pipeline()
pipeline.add_component("prompt", ChatPromptBuilder(template=asked))
pipeline.add_component("model", OpenAIChatGenerator(**common, generation_kwargs=short))
pipeline.connect("prompt.prompt", "model.messages")
text = pipeline.run({"prompt": {"city": "Rome"}})["model"]["replies"][0].text
pieces: list[str] = []
streaming = OpenAIChatGenerator(
    **common, generation_kwargs=short, streaming_callback=lambda one: pieces.append(one.content)
)
streaming.run([ChatMessage.from_user("How is the weather in Rome?")])
assert "".join(pieces) == text

city = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}}, "required": ["city"]}
tool = Tool("weather", "The weather in a city.", {**city, "additionalProperties": False}, weather)
for strict in (False, True):
    calling = OpenAIChatGenerator(
        **common, tools=[tool], tools_strict=strict, generation_kwargs={"tool_choice": "required", "max_tokens": 400}
    )
    question = ChatMessage.from_user("How is the weather in Rome?")
    said = calling.run([question])["replies"][0]
    results = [ChatMessage.from_tool(tool.invoke(**call.arguments), origin=call) for call in said.tool_calls]
    assert results
    OpenAIChatGenerator(**common, tools=[tool], generation_kwargs=short).run([question, said, *results])
