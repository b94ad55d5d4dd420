"""pydantic-ai: text and its stream, a tool, answers by a tool's schema and by the API's own."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

url, name = sys.argv[1:]
provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(name, provider=provider)
        short = {"max_tokens": 16, "temperature": 0.0}
        plain = Agent(model, instructions="Be terse.", model_settings=short)
        said = (await plain.run("How is the weather?")).output
        async with plain.run_stream("How is the weather?") as stream:
            assert await stream.get_output() == said
        for output in (Weather, NativeOutput(Weather)):
            agent = Agent(model, output_type=output, model_settings={"max_tokens": 300, "parallel_tool_calls": False})
            assert (await agent.run("How is the weather in Rome?")).output.city in ("Rome", "Paris")
            async with agent.run_stream("How is the weather in Rome?") as stream:
                assert (await stream.get_output()).city in ("Rome", "Paris")
        tooled = Agent(model, model_settings=short)

        @tooled.tool_plain
        def weather(city: Literal["Rome", "Paris"]) -> str:
            """The weather in a city."""
            return f"Sunny in {city}"

        assert isinstance((await tooled.run("How is the weather in Rome?")).output, str)


asyncio.run(main())
