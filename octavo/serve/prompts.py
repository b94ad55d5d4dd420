"""From a request to what the engine is given of it: token ids, sampling parameters, and the special tokens that are
shown."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.calls import PLAIN, ConstrainedReader, FreeReader, Syntax, calls_grammar, syntax_of
from octavo.serve.requests.generate import Conversation, GenerateRequest, Prompt
from octavo.text import Message, encode_chat, encode_prompt, takes_tools

logger = logging.getLogger("octavo")
SILENT = 1.0  # temperature where neither the request nor the model names one, as in OpenAI's API


@dataclass(frozen=True)
class EngineRequest:
    """What the engine is given for one choice."""

    tokens: list[int]
    params: SamplingParams
    marks: Mapping[int, str] = field(default_factory=dict)  # special tokens that are shown, with their texts
    names: Mapping[str, str] = field(default_factory=dict)  # the request's own names of parameters


class Functions:
    """How the model that is served calls functions."""

    def __init__(self, llm: LLM):
        template = llm.tokenizer.get_chat_template(tools=[{}]) if llm.tokenizer.chat_template else ""
        self.syntax: Syntax = syntax_of(template)
        if self.syntax is PLAIN and template and takes_tools(llm.tokenizer):
            logger.warning("the chat template's form of calls is not known: an answer that is JSON is read as one")
        special = set(llm.tokenizer.all_special_ids)
        self.added = {str(token): id for id, token in llm.tokenizer.added_tokens_decoder.items()}
        marks = {self.added[mark]: mark for mark in self.syntax.marks if mark in self.added}
        self.marks = {id: mark for id, mark in marks.items() if id in special}
        self.stops = (self.added[self.syntax.stop],) if self.syntax.stop in self.added else ()  # ends of calls

    def reader(self, conversation: Conversation) -> partial[FreeReader] | partial[ConstrainedReader] | None:
        """What makes readers of answers; None where no function may be called."""
        if not conversation.functions:
            return None
        names = [function["name"] for function in conversation.functions]
        constrained = _constrains(conversation) and self.syntax.json
        return partial(ConstrainedReader if constrained else FreeReader, self.syntax, names)

    def grammar(self, conversation: Conversation) -> str | None:
        """The grammar that answers match, where they must match one."""
        if not _constrains(conversation):
            return None
        only, parallel = conversation.only, conversation.parallel and conversation.only is None
        functions = [one for one in conversation.functions if only in (None, one["name"])]
        return calls_grammar(self.syntax, functions, self.added, must=conversation.must_call, parallel=parallel)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with what templates read beyond OpenAI's form: ids of calls as they take them, and the name of the
        function whose result a message is."""
        names: dict[str, str] = {}
        known = self.syntax.known_id
        told = []
        for message in messages:
            if calls := message.get("tool_calls"):
                names |= {call["id"]: call["function"]["name"] for call in calls}
                message = {**message, "tool_calls": [{**call, "id": known(call["id"])} for call in calls]}
            if (id := message.get("tool_call_id")) is not None:
                message = {"name": names.get(id), **message, "tool_call_id": known(id)}
            told.append({name: value for name, value in message.items() if value is not None})
        return told


def _constrains(conversation: Conversation) -> bool:
    """Whether answers must match a grammar: what is neither demanded nor promised is read as it comes, which is
    faster."""
    promised = not conversation.parallel or any(function.get("strict") for function in conversation.functions)
    return bool(conversation.functions) and (conversation.must_call or promised)


def engine_requests(llm: LLM, functions: Functions, request: GenerateRequest) -> list[EngineRequest]:
    """What the engine is given for each choice; raises OctavoError for what cannot be served."""
    defaults = SamplingParams.of_model(llm.model.generation, SILENT)
    found = []
    for prompt in request.prompts:
        sampling, names = dict(request.sampling), dict(request.names)
        marks: Mapping[int, str] = {}
        stops: Sequence[int] = ()
        if isinstance(prompt, Conversation) and prompt.functions:
            marks, stops = functions.marks, functions.stops
            try:
                grammar = functions.grammar(prompt)
            except OctavoError as error:
                raise OctavoError(str(error), "tools") from None
            if grammar is not None:
                sampling["grammar"], names["grammar"] = grammar, "tools"
        params = replace(defaults, **sampling)
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *stops))
        tokens = tokens_of(llm, functions, request, prompt)
        for i in range(request.n):  # a seed gives each answer its own
            own = params if params.seed is None else replace(params, seed=(params.seed + i) % (1 << 64))
            found.append(EngineRequest(tokens, own, marks, names))
    return found


def tokens_of(llm: LLM, functions: Functions, request: GenerateRequest, prompt: Prompt) -> list[int]:
    """What the model is given of a prompt."""
    if isinstance(prompt, Conversation):
        told = [{name: value for name, value in one.items() if name != "strict"} for one in prompt.functions]
        tools = [{"type": "function", "function": one} for one in told]
        messages = functions.messages(prompt.messages)
        tokens = encode_chat(llm.tokenizer, messages, tools, prompt.reply, prompt.go_on, prompt.variables)
    elif isinstance(prompt, str) and request.special_tokens:
        tokens = encode_prompt(llm.tokenizer, prompt)
    elif isinstance(prompt, str):
        tokens = list(llm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    else:
        tokens = list(prompt)
    most = request.longest_prompt
    if most is None or most == 0:
        return tokens
    return tokens[-(llm.engine.scheduler.max_context - 1 if most == -1 else most) :]
