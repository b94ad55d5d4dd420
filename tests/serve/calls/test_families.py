"""Each family's syntax is that of its own template: what it writes of a call is read as one, and answers are held to
it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest

from octavo.grammars import Grammars
from octavo.models.model import Model
from octavo.serve.calls import CallDelta, ConstrainedReader, FreeReader, Reader, Syntax, calls_grammar, syntax_of
from octavo.serve.calls.families import HERMES, LLAMA, MISTRAL_LIST, MISTRAL_NAMED, PLAIN
from octavo.serve.calls.gemma import FUNCTION_GEMMA
from tests.serve.calls.published import DOCUMENTED, FAMILIES, TEMPLATES

CITIES: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "weather", "strict": True, "parameters": CITIES},
    {"name": "clock", "parameters": {"type": "object"}},
]
ROME = {"city": "Rome"}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
Found = tuple[str, list[tuple[str, Any]]]


def read(reader: Reader, text: str, size: int) -> Found:
    """Text and calls that a reader finds in an answer that comes in pieces of `size`."""
    parts = [part for i in range(0, len(text), size) for part in reader.push(text[i : i + size])] + reader.finish()
    calls: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallDelta):
            calls.setdefault(part.number, [part.name or "", ""])[1] += part.arguments
    shown = "".join(part for part in parts if isinstance(part, str))
    return shown, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def called(tokenizer: Any, template: str, arguments: Sequence[Any], said: str = "", name: str = "weather") -> str:
    """What a template makes of an assistant's message with calls of one function, without what frames a message."""
    stop = syntax_of(template).stop
    calls = [{"id": "abcdefgh1", "function": {"name": name, "arguments": one}} for one in arguments]

    def render(message: dict[str, Any]) -> str:
        told = [{"role": "user", "content": "?"}, {"role": "assistant", **message}]
        return tokenizer.apply_chat_template(told, chat_template=template, tokenize=False)

    whole, plain = render({"content": said, "tool_calls": calls}), render({"content": "~"})
    start, end = plain.rsplit("~", 1)
    while not whole.startswith(start):  # a template may write another space before a call
        start = start[:-1]
    while not whole.endswith(end):
        end = end[1:]
    return whole[len(start) : len(whole) - len(end)].strip().removesuffix(stop)


def tokens_for(tokenizer: Any, syntax: Syntax) -> dict[str, int]:
    """Gives a tokenizer the tokens for whole texts that models of the family have; returns them."""
    texts = [syntax.begin, syntax.end] if syntax.family == "Hermes" else [*syntax.marks, syntax.stop]
    tokenizer.add_special_tokens({"additional_special_tokens": [text for text in texts if text]})
    return {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "letters"])
@pytest.mark.parametrize("model", TEMPLATES)
def test_a_call_as_the_template_writes_it_is_read_and_held_to(pamphlet: Model, model: str, tokens: bool):
    """With tokens for the family's marks, as its models have them, and with none."""
    check_template(copy.deepcopy(pamphlet.tokenizer), TEMPLATES[model].family, TEMPLATES[model].text, tokens)


def check_template(tokenizer: Any, family: str, template: str, tokens: bool) -> None:
    """A call that the template writes is read, and an answer that is held to the functions may be it."""
    syntax = syntax_of(template)
    assert syntax.family == family
    added = tokens_for(tokenizer, syntax) if tokens else {}
    written = called(tokenizer, template, [ROME])
    for size in (1, 5, len(written)):
        assert read(FreeReader(syntax, ["weather"]), written, size) == ("", [("weather", ROME)])
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    for must in (True, False):
        grammar = calls_grammar(syntax, FUNCTIONS, added, must=must, parallel=False)
        assert takes(grammars, grammar, written)
        assert not takes(grammars, grammar, written.replace("Rome", "Oslo"))
        assert takes(grammars, grammar, "It is sunny.") is not must
    if syntax.json:
        for size in (1, 5, len(written)):
            assert read(ConstrainedReader(syntax, ["weather"]), written, size) == ("", [("weather", ROME)])


EVERYTHING: dict[str, Any] = {
    "text": 'a "quote", {braces}: [x]\nand é',
    "list": ["one", "two"],
    "count": -3,
    "share": 0.5,
    "yes": True,
    "nested": {"deep": {"list": [1, 2], "empty": {}}},
    "none": [],
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_arguments_of_every_kind_are_read_as_the_template_writes_them(pamphlet: Model, model: str):
    written = called(pamphlet.tokenizer, TEMPLATES[model].text, [EVERYTHING])
    reader = FreeReader(syntax_of(TEMPLATES[model].text), ["weather"])
    assert read(reader, written, 3) == ("", [("weather", EVERYTHING)])


@pytest.mark.parametrize("model", DOCUMENTED)
def test_a_call_that_its_publisher_shows_is_written_read_and_held_to(pamphlet: Model, model: str):
    name, arguments, shown = DOCUMENTED[model]
    syntax, tokenizer = syntax_of(TEMPLATES[model].text), pamphlet.tokenizer
    assert called(tokenizer, TEMPLATES[model].text, [arguments], name=name) == shown
    assert read(FreeReader(syntax, [name]), shown, 3) == ("", [(name, arguments)])
    city = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}, "required": [*arguments]}
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    grammar = calls_grammar(syntax, [{"name": name, "strict": True, "parameters": city}], {}, must=True, parallel=False)
    assert takes(grammars, grammar, shown)


def takes(grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether an answer that is held to the grammar may be this text."""
    guide = grammars.guide("grammar", grammar)
    tokens = grammars.tokenizer(text, add_special_tokens=False)["input_ids"]
    return guide.matcher.try_consume_tokens(tokens) == len(tokens) and guide.matcher.is_accepting()


@pytest.mark.parametrize("family", ["Hermes", "Mistral", "Mistral (tokenizer version 11)", "InternLM", "FunctionGemma"])
def test_several_calls_and_text_before_them_are_read_in_their_order(pamphlet: Model, family: str):
    written = called(pamphlet.tokenizer, FAMILIES[family], [ROME, {"city": "Paris"}], "I look.")
    text = "" if family == "Mistral" else "I look."  # its template leaves the text out
    for size in (1, 5, len(written)):
        found = read(FreeReader(syntax_of(FAMILIES[family]), ["weather"]), written, size)
        assert found == (text, [("weather", ROME), ("weather", {"city": "Paris"})])


SAID: list[tuple[str, Found | None]] = [
    ("It is sunny.", ("It is sunny.", [])),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", ("", [("weather", ROME)] * 2)),
    (f"<tool_call>{CALL}", ("", [("weather", ROME)])),  # the closing tag was what ended the answer
    (f"<tool_call>{CALL}\n{CALL}</tool_call>", ("", [("weather", ROME)] * 2)),
    (f"[{CALL}, {CALL}]", ("", [("weather", ROME)] * 2)),  # without tags
    (
        f"<tool_call>{CALL.replace('Rome', 'a </tool_call> b')}</tool_call>",
        ("", [("weather", {"city": "a </tool_call> b"})]),
    ),
    (f"Write `<tool_call>` first. <tool_call>{CALL}</tool_call>", ("Write `<tool_call>` first.", [("weather", ROME)])),
    ("Tags: <tool_call>x</tool_call>.", ("Tags: <tool_call>x</tool_call>.", [])),
    (
        '<tool_call>\n{\n  "name": "weather",\n  "arguments": {\n    "city": "Ro\nme"\n  }\n}\n</tool_call>',
        ("", [("weather", {"city": "Ro\nme"})]),
    ),
    (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
        ("", [("weather", ROME)]),
    ),
    ('<tool_call>{"name": "weather"}</tool_call>', ("", [("weather", {})])),
    (
        f'<tool_call>{{"name": "other", "arguments": {{}}}}</tool_call>\n<tool_call>{CALL}</tool_call>',
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', [("weather", ROME)]),
    ),
    (
        f'[{CALL}, {{"name": "other", "arguments": {{}}}}]',
        ('{"name": "other", "arguments": {}}', [("weather", ROME)]),
    ),
    *(
        (f'<tool_call>{{"name": "weather", "arguments": {{"a": {bad}}}}}', None)
        for bad in ("NaN", "-Infinity", "1e999")
    ),
    (f"```json\n{CALL}\n```", ("", [("weather", ROME)])),  # as Qwen's small models write it
    ('```json\n{"an": "object"}\n```', ('```json\n{"an": "object"}\n```', [])),
    ("```python\nprint()\n```", ("```python\nprint()\n```", [])),
    ('{"an": "object"}', ('{"an": "object"}', [])),
    ("[]", ("[]", [])),
    ("{not JSON", ("{not JSON", [])),
    ("a < b and <tool", ("a < b and <tool", [])),
    (f"<tool_call>{CALL[:30]}", (f"<tool_call>{CALL[:30]}", [])),
]


@pytest.mark.parametrize(("said", "found"), SAID, ids=[said[:40] for said, _ in SAID])
def test_what_is_a_call_is_read_as_json_and_what_is_none_is_text(said: str, found: Found | None):
    for size in (1, 3, len(said)):
        assert read(FreeReader(HERMES, ["weather"]), said, size) == (found or (said, []))


def test_text_without_calls_is_not_held_back():
    reader = FreeReader(HERMES, ["weather"])
    assert reader.push("It is ") + reader.push("sunny <b") == ["It is", " sunny <b"]


@pytest.mark.parametrize(
    ("syntax", "said"),
    [
        (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "weather", "parameters": {}}'),
        (LLAMA, '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}{"name": "weather"}'),
        (MISTRAL_NAMED, '[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{"city": "Rome"}[TOOL_CALLS]weather{}'),
        (FUNCTION_GEMMA, "<start_function_call>call:weather{city:<escape>Rome<escape>}<end_function_call>"
                               "<start_function_call>call:weather{}<end_function_call>"),
        (PLAIN, f'[{CALL}, {{"name": "weather", "arguments": {{}}}}]'),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else value.family,
)  # fmt: skip
def test_other_ways_that_models_of_a_family_write_calls_are_read(syntax: Any, said: str):
    for size in (1, 7, len(said)):
        assert read(FreeReader(syntax, ["weather"]), said, size) == ("", [("weather", ROME), ("weather", {})])


UNFRAMED = [
    CALL,
    f"{CALL}\n{CALL}",
    f"```json\n{CALL}\n```",
    '```\n{\n  "name": "weather",\n  "parameters": {"city": "Rome"}\n}',
]


@pytest.mark.parametrize("said", UNFRAMED, ids=[said[:30] for said in UNFRAMED])
def test_calls_without_their_frame_are_held_to_their_schema_too(pamphlet: Model, said: str):
    grammars = Grammars(pamphlet.tokenizer, pamphlet.bound.vocab_size, pamphlet.eos_ids)
    grammar = calls_grammar(HERMES, FUNCTIONS, {}, must=False, parallel=True)
    assert takes(grammars, grammar, said)
    assert not takes(grammars, grammar, said.replace("Rome", "Oslo"))
    for other in ('{"name": "Rome"}', "```json\n[1]\n```", '{"name": "other", "arguments": {"a": 1}}'):
        assert takes(grammars, grammar, other)
        assert read(ConstrainedReader(HERMES, ["weather"]), other, 3) == (other, [])
    for size in (1, 5, len(said)):
        assert read(ConstrainedReader(HERMES, ["weather"]), said, size) == (
            "",
            [("weather", ROME)] * said.count("Rome"),
        )


def test_an_answer_that_must_call_may_end_after_a_call_and_after_the_line_break_behind_it(pamphlet: Model):
    """Small models write the line break that stands between calls, and then want to end: another call is not forced."""
    grammars = Grammars(pamphlet.tokenizer, pamphlet.bound.vocab_size, pamphlet.eos_ids)
    grammar = calls_grammar(HERMES, FUNCTIONS, {}, must=True, parallel=True)
    block = f"<tool_call>\n{CALL}\n</tool_call>"
    for said, calls in ((block, 1), (f"{block}\n", 1), (f"{block}\n{block}", 2), (f"{block}\n{block}\n", 2)):
        assert takes(grammars, grammar, said)
        assert read(ConstrainedReader(HERMES, ["weather"]), said, 3) == ("", [("weather", ROME)] * calls)
    assert not takes(grammars, grammar, f"{block}\nIt is sunny.")


def test_arguments_of_held_calls_are_passed_on_as_they_come():
    reader, text = ConstrainedReader(HERMES, ["weather"]), f"<tool_call>\n{CALL}\n</tool_call>"
    pieces = [part for sign in text for part in reader.push(sign) if isinstance(part, CallDelta)]
    assert (pieces[0].name, pieces[0].arguments) == ("weather", "")
    assert "".join(piece.arguments for piece in pieces) == '{"city": "Rome"}'
    assert len(pieces) > 10


def test_mistrals_ids_are_those_that_its_template_takes():
    assert len(MISTRAL_LIST.new_id()) == 9
    known = MISTRAL_LIST.known_id
    assert known("abcdefgh1") == "abcdefgh1"
    assert len(known("call_0123456789abcdef")) == 9
    assert known("call_1") == known("call_1") != known("call_2")
