"""llama-index (openai-like): complete, chat, their streams, a tool, a structured answer."""

import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, name = sys.argv[1:]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Paris"]


def weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"Sunny in {city}"


common = {"model": name, "api_base": f"{url}/v1", "api_key": "none", "timeout": 300, "temperature": 0.0}
text = OpenAILike(**common, is_chat_model=False, max_tokens=16)
said = text.complete("Once upon a time").text
assert "".join(piece.delta for piece in text.stream_complete("Once upon a time")) == said
messages = [ChatMessage(role="system", content="Be terse."), ChatMessage(role="user", content="How is the weather?")]
chat = OpenAILike(**common, is_chat_model=True, max_tokens=16)
answer = chat.chat(messages).message.content
assert "".join(piece.delta for piece in chat.stream_chat(messages)) == answer

calling = OpenAILike(**common, is_chat_model=True, is_function_calling_model=True, max_tokens=300)
tool = FunctionTool.from_defaults(weather)
asked = calling.chat_with_tools([tool], user_msg="How is the weather in Rome?", tool_required=True)
assert calling.get_tool_calls_from_response(asked)[0].tool_kwargs["city"] in ("Rome", "Paris")
assert calling.structured_predict(Weather, PromptTemplate("How is the weather in Rome?")).city in ("Rome", "Paris")
