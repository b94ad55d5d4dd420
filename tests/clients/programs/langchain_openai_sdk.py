"""langchain-openai: invoke, stream, bind_tools, with_structured_output in each method, responses."""

import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import LengthFinishReasonError
from pydantic import BaseModel

url, name = sys.argv[1:]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Paris"]


@tool
def weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"Sunny in {city}"


for responses in (False, True):
    model = ChatOpenAI(
        model=name, base_url=f"{url}/v1", api_key="none", max_tokens=200, timeout=300, use_responses_api=responses
    )
    short = model.model_copy(update={"max_tokens": 16, "temperature": 0})
    assert short.invoke("How is the weather?").text == "".join(
        piece.text for piece in short.stream("How is the weather?")
    )
    for strict in (None, True):
        bound = model.bind_tools([weather], tool_choice="any", strict=strict, parallel_tool_calls=False)
        said = bound.invoke("How is the weather in Rome?")
        (call,) = said.tool_calls
        result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        history = [HumanMessage("How is the weather in Rome?"), said, result]
        short.bind_tools([weather], strict=strict).invoke(history)
        streamed = list(bound.stream("How is the weather in Rome?"))
        assert any(chunk["name"] == "weather" for piece in streamed for chunk in piece.tool_call_chunks)
    for method in ("function_calling", "json_schema", "json_mode"):
        structured = model.with_structured_output(Weather, method=method, include_raw=True)
        try:
            found = structured.invoke("Say in JSON how the weather in Rome is.")
            text, parsed = found["raw"].text, found["parsed"]
        except LengthFinishReasonError as cut:  # a small model writes an object without end: it is closed in time
            text, parsed = cut.completion.choices[0].message.content, None
        if method == "json_mode":  # any object: whether it is a Weather is the model's own affair
            assert isinstance(json.loads(text), dict)
        else:
            assert parsed.city in ("Rome", "Paris")
