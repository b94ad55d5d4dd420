"""`octavo generate`: one prompt answered on stdout, or a file of prompts answered into a file.

What is asked for goes to stdout, what there is to say about it to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence as Rows
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.loading import ServeOptions
from octavo.cli.options import Ray, Replicas, option, takes
from octavo.cli.progress import say, warnings_after
from octavo.cli.sampling import SamplingOptions, sampling_option
from octavo.engine.params import SamplingParams
from octavo.errors import OctavoError
from octavo.measure.answered import Answered

if TYPE_CHECKING:
    from octavo.cli.answer_file import Line, Output
    from octavo.llm import LLM


@takes(ServeOptions, SamplingOptions)
def generate(
    options: ServeOptions,
    sampling: SamplingOptions,
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ] = None,
    prompt: Annotated[str | None, option("The same; with it MODEL may be left out.")] = None,
    input: Annotated[
        str | None,
        option(
            'Lines of {"prompt": …} or {"messages": …}, sampling fields beside; - is stdin. With --ray several '
            'files: "prompts/*.jsonl" or .parquet, s3:// too.'
        ),
    ] = None,
    output: Annotated[
        str | None,
        option("File for their answers, with --ray a directory; one that exists is gone on with. [default: stdout]"),
    ] = None,
    chat: Annotated[bool, option("Put the prompt into the model's chat template.", "--chat")] = False,
    logprobs: Annotated[int | None, sampling_option("logprobs")] = None,
    ray: Ray = None,
    replicas: Replicas = None,
    as_json: Annotated[bool, option("One JSON document on stdout and nothing else.", "--json")] = False,
) -> None:
    """Continue a prompt, or all prompts of a file at a time."""
    if text is not None and prompt is not None:
        raise OctavoError("PROMPT and --prompt are the same; give one")
    prompt = text if prompt is None else prompt
    SamplingParams(logprobs=logprobs)  # refuses what it does not take before a model is loaded
    if logprobs is not None and not (as_json or input):
        raise OctavoError("--logprobs come as JSON: add --json")
    if input is not None and (prompt is not None or as_json):
        other = "a prompt" if prompt is not None else "--json (its answers are JSON lines)"
        raise OctavoError(f"--input and {other} exclude each other")
    if input is None and output is not None:
        raise OctavoError("--output is for the answers to an --input; redirect stdout for the one to a prompt")
    if (ray is None and replicas is not None) or (ray is not None and (input in (None, "-") or output is None)):
        raise OctavoError("--ray, to which --replicas belongs, answers the files of an --input into an --output")
    if ray is not None:
        from octavo.cli.batches import generate_on_ray

        generate_on_ray(ray, replicas, options, sampling, str(input), str(output), chat, logprobs)
    elif input is None:
        given = _prompt(prompt)
        llm = options.llm()
        _one(llm, given, _params(llm, sampling, logprobs), chat, as_json)
    else:
        _many(options, sampling, input, None if output is None else Path(output), chat, logprobs)


def _one(llm: LLM, text: str, params: SamplingParams, chat: bool, as_json: bool) -> None:
    from octavo.jsonl import answer
    from octavo.measure.memory.footprint import Footprint
    from octavo.units import format_bytes

    start = time.perf_counter()
    pieces = (
        llm.chat([{"role": "user", "content": text}], params, stream=True)
        if chat
        else llm.generate(text, params, stream=True)
    )
    with warnings_after():
        try:
            for delta in pieces:
                if not as_json:
                    print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            print(flush=True)  # ends the answer's line
            raise
        if not as_json:
            print(flush=True)
    completion = delta.completion
    assert completion is not None
    if completion.error:
        say(f"error: {completion.error}")
        raise typer.Exit(1)
    # The K and V of the last token are not in the cache: nothing came after it.
    held = Footprint.of(llm, completion.prompt_tokens + len(completion.token_ids) - 1)
    found = Answered(tokens=len(completion.token_ids), seconds=time.perf_counter() - start)
    if as_json:
        document = {
            "model": llm.model.name,
            "kv": held.format,
            **answer(llm, completion),
            "seconds": round(found.seconds, 3),
            "tokens_per_second": round(found.rate, 1),
            "kv_bytes": held.nbytes,
            "kv_bytes_16_bits": held.nbytes_16,
        }
        print(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2))
        return
    edges = f" ({format_bytes(held.size.session(0))} for edges)" if held.size.ring else ""
    say(
        f"{completion.prompt_tokens:,} tokens in, {found.tokens:,} out in {found.seconds:.1f} s "
        f"({found.rate:.1f} tok/s) · finish: {completion.finish_reason} · "
        f"KV {held.format}: {format_bytes(held.nbytes)}{edges}, in 16 bits {format_bytes(held.nbytes_16)}"
    )


def _many(
    options: ServeOptions, sampling: SamplingOptions, input: str, path: Path | None, chat: bool, logprobs: int | None
) -> None:
    from octavo.cli.answer_file import Output, read_lines, shaping_of

    shaping = shaping_of(options, chat, logprobs)
    try:
        if input == "-":
            lines = read_lines(sys.stdin.buffer, shaping | asdict(sampling))
        else:
            with open(input, "rb") as file:
                lines = read_lines(file, shaping | asdict(sampling))
    except OSError as error:
        raise OctavoError(f"{input} cannot be read: {error.strerror}") from None
    if not lines:
        raise OctavoError(f"{input} holds no prompt")
    output = Output(path, lines)
    left = [line for line in lines if line.number not in output.answered]
    if output.answered:
        say(f"{len(output.answered):,} of {len(lines):,} lines are answered in {path} already")
    if left:
        llm = options.llm()
        _serve(llm, left, output, _params(llm, sampling, logprobs), chat)


def _serve(llm: LLM, lines: Rows[Line], output: Output, defaults: SamplingParams, chat: bool) -> None:
    """Answer the lines together, each written when it is complete."""
    from octavo.cli.progress import progress
    from octavo.jsonl import answer, fields, parse

    served: list[Line] = []
    requests: list[tuple[list[int], SamplingParams]] = []
    found, start = Answered(), time.perf_counter()
    with progress() as bar:
        task = bar.add_task("answering", total=len(lines))

        def refuse(line: Line, why: str) -> None:
            output.write(line, {"error": why})
            found.refused += 1
            bar.console.print(f"line {line.number}: {why}", markup=False, highlight=False, soft_wrap=True)
            bar.advance(task)

        try:
            for line in lines:
                try:
                    requests.append(parse(fields(line.text), llm, defaults, chat))
                    served.append(line)
                except OctavoError as error:
                    refuse(line, str(error))
            pieces = llm.generate([p for p, _ in requests], [p for _, p in requests], stream=True) if requests else ()
            for delta in pieces:
                if delta.completion and delta.completion.error:
                    refuse(served[delta.index], delta.completion.error)
                elif delta.completion:
                    output.write(served[delta.index], answer(llm, delta.completion))
                    found.rows += 1
                    found.tokens += len(delta.completion.token_ids)
                    found.seconds = time.perf_counter() - start
                    bar.update(task, advance=1, description=f"answering, {found.rate:.0f} tok/s")
        except KeyboardInterrupt:
            again = f"; the same command goes on with {output.path}" if output.path else ""
            raise KeyboardInterrupt(f"{_lines(found.rows)} answered{again}") from None
    say(f"{_lines(found.rows)} answered, {found.tokens:,} tokens in {found.seconds:.1f} s ({found.rate:.1f} tok/s)")
    if found.refused:
        told = f"{_lines(found.refused)} could not be served and got the reason for an answer"
        say(f"{told}; the same command tries again")
        raise typer.Exit(1)


def _params(llm: LLM, sampling: SamplingOptions, logprobs: int | None) -> SamplingParams:
    params = sampling.params(llm.default_params)
    return params if logprobs is None else replace(params, logprobs=logprobs)


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise OctavoError(
            "there is no prompt: octavo generate MODEL PROMPT, or pipe it in, or answer a file with --input"
        )
    if given is None or given == "-":
        given = sys.stdin.read().removesuffix("\n")
    if not given:
        raise OctavoError("the prompt is empty")
    return given.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _lines(n: int) -> str:
    return f"{n:,} line" if n == 1 else f"{n:,} lines"
