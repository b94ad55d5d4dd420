"""A whole job on real models, against llama.cpp and OpenVINO GenAI: many prompts at once, an answer to each.

Prompts of WikiText-2, greedy answers of a fixed length, the same threads for all, 16-bit weights. In each round every
program answers the first token only, then the whole job, in turn: the first is the prefill, the difference the decode;
--whole leaves the first out. With --copied a round is shorter: the prefill of two prompts, then steps of all sequences,
for which K and V of one prompt were copied; prefill, decode and job are what follows for as many. Reported are medians
over rounds, and of ratios within a round. That all compute the same model is checked by their answers to some prompts:
each must share most first tokens with a float32 forward of transformers. The last line is one JSON document.

    python ../shared/models/get.py ~/models                                       # leaves NAME.gguf and NAME
    pip install openvino-genai                                                    # and llama.cpp as in peers_cpu.py
    python benchmarks/jobs_cpu.py ~/models/smollm2 --data ../shared/data/text --llama-cpp ~/llama-cpp/bin/python \\
        --openvino python --out benchmarks/results/jobs-cpu-zen3.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, LlamaCpp, Octavo
from llama_gguf import f16_gguf
from machine import describe

from octavo import LLM, SamplingParams
from octavo.corpus import load_texts
from octavo.models.load import load_model
from octavo.models.model import Model
from octavo.text_windows import consecutive_windows

HERE = Path(__file__).parent
TWO, STEPS = 2, 24  # prompts and steps of a round with --copied
AGREED = 0.7  # of the first tokens: programs that round differently choose another where two are as likely
Prompts = list[list[int]]
Job = Callable[[Prompts, int], tuple[float, Prompts]]  # (prompts, tokens of an answer) → seconds, answers


def octavo(model: Model, kv: str, batch: int, length: int) -> Job:
    llm = LLM(model, kv, max_batch_size=batch, session_len=length, prefix_caching=False)

    def run(prompts: Prompts, tokens: int) -> tuple[float, Prompts]:
        start = time.perf_counter()
        answers = llm.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0))
        return time.perf_counter() - start, [answer.token_ids for answer in answers]

    return run


def worker(close: ExitStack, command: Sequence[object]) -> tuple[Job, dict[str, str]]:
    """A program behind a pipe, and what it says of itself."""
    process = close.enter_context(
        subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    close.callback(process.stdin.close)

    def ask(line: str = "") -> dict[str, Any]:
        if line:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        for reply in iter(process.stdout.readline, ""):
            if reply.startswith("{"):  # OpenVINO also tells what it loads
                return json.loads(reply)
        raise SystemExit(f"{command[1]} ended with status {process.wait()}")

    about = ask()

    def run(prompts: Prompts, tokens: int) -> tuple[float, Prompts]:
        reply = ask(json.dumps({"prompts": prompts, "tokens": tokens}))
        return reply["seconds"], reply["tokens"]

    return run, about


def first_tokens(path: Path, prompts: Prompts) -> list[int]:
    hf = load_model(path).float()
    with torch.inference_mode():
        return [hf(input_ids=torch.tensor([prompt]), logits_to_keep=1).logits.argmax().item() for prompt in prompts]


def first_of_job(job: Job, prompts: Prompts) -> list[int]:
    return [answer[0] for answer in job(prompts, 2)[1]]


def first_of_contestant(contestant: Contestant, prompts: Prompts) -> list[int]:
    return [next(iter(contestant.answer(prompt, 1)[0])) for prompt in prompts]


def agreement(
    firsts: dict[str, Callable[[Prompts], list[int]]], prompts: Prompts, expected: list[int]
) -> dict[str, float]:
    """The share of first tokens that each program has as float32 has them; ends the program if one has too few."""
    agreed = {}
    for name, first in firsts.items():  # warm, too
        agreed[name] = statistics.mean(a == b for a, b in zip(first(prompts), expected, strict=True))
        print(f"{name:18s} {agreed[name]:.0%} of the first tokens as in float32", flush=True)
    if strangers := [name for name, share in agreed.items() if share < AGREED]:
        raise SystemExit(f"{', '.join(strangers)}: not the same model, so nothing is reported")
    return agreed


def measure(
    jobs: dict[str, Job], prompts: Prompts, tokens: int, rounds: int, whole_only: bool
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each job in each round, in all and by part."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name, job in jobs.items():
            prefill = None if whole_only else job(prompts, 1)[0]
            whole = job(prompts, tokens)[0]
            parts = {} if prefill is None else {"prefill": prefill, "decode": whole - prefill}
            found[name].append({**parts, "job": whole})
            print(f"round {turn + 1}  {name:18s} " + "  ".join(
                f"{part} {seconds:.2f} s" for part, seconds in found[name][-1].items()), flush=True)  # fmt: skip
    return found


def measure_copied(
    contestants: dict[str, Contestant], prompts: Prompts, batch: int, tokens: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """What `measure` says, from shorter rounds; the first `batch` prompts are decoded, the others computed alone."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for turn in range(rounds):
        unseen = prompts[batch + turn * TWO :][:TWO]
        prefill = {name: each.prefill(unseen) * batch / TWO for name, each in contestants.items()}
        for each in contestants.values():
            each.fill(prompts[:batch])
            each.decode(2)  # warm
        for name, each in contestants.items():
            decode = each.decode(STEPS) * (tokens - 1) / STEPS
            found[name].append({"prefill": prefill[name], "decode": decode, "job": prefill[name] + decode})
            print(f"round {turn + 1}  {name:18s} " + "  ".join(
                f"{part} {seconds:.2f} s" for part, seconds in found[name][-1].items()), flush=True)  # fmt: skip
    return found


def summary(found: dict[str, list[dict[str, float]]], batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Tokens per second, and how many times as fast each of ours is as each other."""
    counts = {"prefill": batch * prompt, "decode": batch * (tokens - 1), "job": batch * tokens}
    rates = {
        name: {part: round(count / statistics.median(each[part] for each in rounds), 1)
               for part, count in counts.items() if part in rounds[0]}
        for name, rounds in found.items()
    }  # fmt: skip
    ours = [name for name in found if name.startswith("octavo")]
    times = {name: {other: _ratios(found[name], found[other]) for other in found if other != name} for name in ours}
    return {"tokens_per_second": rates, "times_as_fast": times}


def _ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    pairs = list(zip(ours, theirs, strict=True))
    return {part: round(statistics.median(b[part] / a[part] for a, b in pairs), 2) for part in ours[0]}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("models", nargs="+", type=Path, help="NAME, with NAME.gguf beside it")
    cli.add_argument("--data", type=Path, required=True, help="folder of wikitext2.*.txt")
    cli.add_argument("--llama-cpp", type=Path, help="the Python that has llama-cpp-python; without, it stays out")
    cli.add_argument("--openvino", type=Path, help="the Python that has openvino-genai; without, it stays out")
    cli.add_argument("--batch", type=int, default=16, help="prompts")
    cli.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    cli.add_argument("--tokens", type=int, default=128, help="of an answer")
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--whole", action="store_true", help="time whole jobs alone")
    cli.add_argument("--copied", action="store_true", help="time short parts; OpenVINO stays out")
    cli.add_argument("--checked", type=int, default=6, help="prompts whose first tokens are compared")
    cli.add_argument("--kv", nargs="+", default=["bf16", "int8-token", "kv8"])
    cli.add_argument("--llama-kv", nargs="+", default=["f16", "q8_0"])
    cli.add_argument("--out", type=Path)
    args = cli.parse_args()

    rows: list[dict[str, Any]] = []
    if args.out and args.out.is_file():
        rows = json.loads(args.out.read_text())["rows"]
    for path in args.models:
        model = Model.load(path)
        texts = load_texts("wikitext2", args.data, "test")
        count = args.batch + (args.rounds * TWO if args.copied else 0)
        prompts = consecutive_windows(texts, model.tokenizer, args.prompt, count)
        checked = prompts[: args.checked]
        expected = first_tokens(path, checked)
        length, threads = args.prompt + args.tokens + 1, torch.get_num_threads()
        with tempfile.TemporaryDirectory() as directory, ExitStack() as close:
            about: dict[str, Any] = {}
            gguf = Path(directory) / "f16.gguf"
            if args.llama_cpp or args.openvino:
                f16_gguf(path.with_name(path.name + ".gguf"), gguf)
            if args.copied:
                contestants = {f"octavo {kv}": Octavo(model, None, kv, args.batch, length) for kv in args.kv}
                for kv in args.llama_kv if args.llama_cpp else ():
                    peer = LlamaCpp(args.llama_cpp, gguf, kv, args.batch, length, threads)
                    contestants[f"llama.cpp {kv}"] = close.enter_context(peer)
                    about[f"llama.cpp {kv}"] = peer.about
                agreed = agreement(
                    {name: partial(first_of_contestant, each) for name, each in contestants.items()}, checked, expected
                )
                found = measure_copied(contestants, prompts, args.batch, args.tokens, args.rounds)
            else:
                jobs = {f"octavo {kv}": octavo(model, kv, args.batch, length) for kv in args.kv}
                sizes = ["--batch", args.batch, "--threads", threads]
                for kv in args.llama_kv if args.llama_cpp else ():
                    own = ["--kv", kv, "--length", length]
                    command = [args.llama_cpp, HERE / "llama_cpp_worker.py", gguf, *sizes, *own]
                    jobs[f"llama.cpp {kv}"], about[f"llama.cpp {kv}"] = worker(close, command)
                if args.openvino:
                    command = [args.openvino, HERE / "openvino_worker.py", gguf, *sizes]
                    jobs["openvino u8"], about["openvino u8"] = worker(close, command)
                agreed = agreement({name: partial(first_of_job, job) for name, job in jobs.items()}, checked, expected)
                found = measure(jobs, prompts, args.tokens, args.rounds, args.whole)
        row = {
            "model": path.name, "batch": args.batch, "prompt": args.prompt, "tokens": args.tokens,
            "rounds": args.rounds, "copied": args.copied, "peers": about, "first_tokens_as_float32": agreed,
            **summary(found, args.batch, args.prompt, args.tokens),
            "commit": describe()["commit"],
        }  # fmt: skip
        same = ("model", "batch", "prompt", "tokens", "copied")
        rows = [old for old in rows if any(old.get(key, False) != row[key] for key in same)
                or old["tokens_per_second"].keys() != row["tokens_per_second"].keys()] + [row]  # fmt: skip
        document = {"benchmark": "jobs_cpu", **describe(), "rows": rows}
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
