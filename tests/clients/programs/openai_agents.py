"""openai-agents: an agent with a tool, over responses and chat, whole and streamed; an answer by a schema."""

import asyncio
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

url, name = sys.argv[1:]
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
called: list[str] = []


@function_tool
def weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    called.append(city)
    return "Sunny"


class Report(BaseModel):
    sky: Literal["clear", "grey"]


async def main() -> None:
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        model = kind(model=name, openai_client=client)
        settings = ModelSettings(tool_choice="required", max_tokens=300, parallel_tool_calls=False)
        agent = Agent("Reporter", instructions="Be terse.", model=model, tools=[weather], model_settings=settings)
        if kind is OpenAIChatCompletionsModel:  # it takes words that are cut off, the other does not
            assert isinstance((await Runner.run(agent, "How is the weather in Rome?", max_turns=6)).final_output, str)
        called.clear()
        agent.tool_use_behavior = "stop_on_first_tool"
        assert (await Runner.run(agent, "How is the weather in Rome?")).final_output == "Sunny"
        streamed = Runner.run_streamed(agent, "How is the weather in Rome?")
        assert [event async for event in streamed.stream_events()]
        assert streamed.final_output == "Sunny"
        assert len(called) == 2
        plain = Agent("Sky", model=model, output_type=Report, model_settings=ModelSettings(max_tokens=200))
        assert (await Runner.run(plain, "How is the sky?")).final_output.sky in ("clear", "grey")


asyncio.run(main())
