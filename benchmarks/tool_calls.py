"""Do tool calls stay valid with a quantized cache? Fifty requests with five functions, answered greedily in each format.

Prompts are made by the model's chat template and calls are read by the server's own reader. A call is valid if it
parses, satisfies the function's schema and names the function that was asked for; it is right if its arguments are those
that the request names. The functions stand before every request, so that its rows are read as codes. The baseline is the
model's own 16 bits.

    python benchmarks/tool_calls.py MODEL --work-dir DIR --data ../shared/data/text --out benchmarks/results/tool-calls.json
"""  # noqa: E501

from __future__ import annotations

import json
from typing import Any

import jsonschema
from machine import describe
from over_models import calibrated, keep, kept, options

from octavo import LLM, SamplingParams
from octavo.cli.progress import telling
from octavo.measure.candidate import Candidate
from octavo.models.model import Model
from octavo.quant.format import KVFormat
from octavo.serve.calls import CallDelta, FreeReader
from octavo.serve.prompts import Functions
from octavo.text import encode_chat

Case = tuple[str, str, dict[str, Any]]  # a request, the function that it asks for, and its arguments
MAX_TOKENS = 96


def function(name: str, description: str, required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"name": name, "description": description, "parameters": parameters}


FUNCTIONS = [
    function(
        "get_weather", "The weather forecast of a city.", ["city", "days"],
        city={"type": "string", "description": "Name of the city"},
        days={"type": "integer", "description": "Days ahead, 1 to 10", "minimum": 1, "maximum": 10},
    ),
    function(
        "convert_currency", "Converts an amount of money.", ["amount", "source", "target"],
        amount={"type": "number"},
        source={"type": "string", "enum": ["USD", "EUR", "GBP", "JPY", "CHF"]},
        target={"type": "string", "enum": ["USD", "EUR", "GBP", "JPY", "CHF"]},
    ),
    function(
        "book_table", "Books a table in a restaurant.", ["restaurant", "people", "time"],
        restaurant={"type": "string"},
        people={"type": "integer", "minimum": 1},
        time={"type": "string", "description": "24-hour time like 19:30", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
    ),
    function(
        "send_message", "Sends a short message to a person.", ["recipient", "text"],
        recipient={"type": "string"},
        text={"type": "string"},
    ),
    function(
        "set_timer", "Starts a timer.", ["minutes", "label"],
        minutes={"type": "integer", "minimum": 1},
        label={"type": "string", "description": "What it is for, one or two words"},
    ),
]  # fmt: skip
CITIES = ("Paris", "Lima", "Oslo", "Cairo", "Kyoto", "Boston", "Delhi", "Madrid", "Quito", "Vienna")
MONEY = (("USD", "EUR"), ("EUR", "GBP"), ("GBP", "JPY"), ("CHF", "USD"), ("JPY", "CHF"))
PLACES = ("Luna", "The Old Mill", "Sakura", "Bella Roma", "Green Garden")
PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Greta", "Hugo", "Irene", "Jonas")
TEXTS = ("I am on my way", "The meeting is moved to Monday", "Please call me back", "Dinner is ready", "Thank you")
TIMERS = ("tea", "pasta", "laundry", "bread", "break")
SYSTEM = (
    "You are an assistant that works only through the functions that you are given. Every request of the user can be "
    "served by exactly one of them: choose it, take the values from the request as they are written there, leave none "
    "of the required ones out, and add none that nobody has named. Write numbers as numbers, times as hours and "
    "minutes in 24 hours, and currencies by their codes of three letters. Say nothing before or after the call."
)


def cases() -> list[Case]:
    """Ten requests of each function."""
    found: list[Case] = []
    for i, city in enumerate(CITIES):
        found.append((f"What will the weather be like in {city} in the next {i % 7 + 2} days?", "get_weather",
                      {"city": city, "days": i % 7 + 2}))  # fmt: skip
    for i in range(10):
        source, target = MONEY[i % len(MONEY)]
        amount = 25 * (i + 1) + 7
        found.append((f"How much is {amount} {source} in {target}?", "convert_currency",
                      {"amount": amount, "source": source, "target": target}))  # fmt: skip
    for i in range(10):
        place, people, time = PLACES[i % len(PLACES)], i % 6 + 2, f"{18 + i % 4}:{(i % 2) * 3}0"
        found.append((f"Book a table for {people} people at {place} at {time}.", "book_table",
                      {"restaurant": place, "people": people, "time": time}))  # fmt: skip
    for i, name in enumerate(PEOPLE):
        text = TEXTS[i % len(TEXTS)]
        found.append((f'Send {name} this message: "{text}"', "send_message", {"recipient": name, "text": text}))
    for i in range(10):
        label, minutes = TIMERS[i % len(TIMERS)], 3 * i + 4
        found.append((f"Set a timer of {minutes} minutes for the {label}.", "set_timer",
                      {"minutes": minutes, "label": label}))  # fmt: skip
    return found


def judge(functions: Functions, answer: str, name: str, arguments: dict[str, Any]) -> tuple[bool, bool]:
    """Whether an answer is one valid call of the function that was asked for, and with the right arguments."""
    reader = FreeReader(functions.syntax, [one["name"] for one in FUNCTIONS])
    calls = [part for part in (*reader.push(answer), *reader.finish()) if isinstance(part, CallDelta)]
    if len(calls) != 1 or calls[0].name != name:
        return False, False
    [schema] = [one["parameters"] for one in FUNCTIONS if one["name"] == name]
    try:
        found = json.loads(calls[0].arguments)
        jsonschema.validate(found, schema)
    except (ValueError, jsonschema.ValidationError):
        return False, False
    plain = {key: value.strip(" .") if isinstance(value, str) else value for key, value in found.items()}
    return True, plain == arguments


def measure(model: Model, candidates: list[Candidate], asked: list[Case], tell: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    first: list[list[int]] = []
    for candidate in candidates:
        llm: LLM = candidate.llm(model, session_len=2048, max_batch_size=10)
        functions = Functions(llm)
        tools = [{"type": "function", "function": one} for one in FUNCTIONS]
        prompts = [
            encode_chat(
                llm.tokenizer, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}], tools
            )
            for request, _, _ in asked
        ]
        answers: list[Any] = [None] * len(prompts)
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        for delta in llm.generate(prompts, params, stream=True):
            if delta.completion is not None:
                answers[delta.index] = delta.completion
                tell(f"calls in {candidate.name}", sum(map(bool, answers)), len(prompts))
        judged = [judge(functions, answer.text, *case[1:]) for answer, case in zip(answers, asked, strict=True)]
        tokens = [answer.token_ids for answer in answers]
        first = first or tokens
        rows.append({
            "model": model.path.name, "name": candidate.name, "requests": len(asked),
            "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
            "valid": sum(valid for valid, _ in judged), "right": sum(right for _, right in judged),
            "same_answer": sum(own == other for own, other in zip(tokens, first, strict=True)),
            "not_valid": [answer.text for answer, (valid, _) in zip(answers, judged, strict=True) if not valid][:3],
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | cache | valid | right arguments | the same answer |", "|---|---|---:|---:|---:|"]
    for row in rows:
        n = row["requests"]
        cells = (f"{row[key]} of {n}" for key in ("valid", "right", "same_answer"))
        lines.append(f"| {row['model']} | `{row['name']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    cli = options(__doc__, "ptb.*.txt")
    cli.add_argument("--formats", default="kv8,k8v4,kv4,int8")
    cli.add_argument("--every", type=int, default=1, help="only every so many-th request")
    args = cli.parse_args()

    rows = kept(args.out)
    for path in args.models:
        model = Model.load(path)
        calibration = calibrated(model, args)
        formats = [model.bound.raw_format, *map(KVFormat.parse, args.formats.split(","))]
        candidates = [Candidate(str(f), f, calibration if f.takes_calibration else None) for f in formats]
        with telling("calls") as tell:
            found = measure(model, candidates, cases()[:: args.every], tell)
        rows = [row for row in rows if row["model"] != model.path.name] + found
        keep(args.out, {"benchmark": "tool calls", **describe(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
