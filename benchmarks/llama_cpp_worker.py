"""llama.cpp behind a pipe, in a Python and an OpenMP of its own: peers_cpu.py starts it with the interpreter that has
llama-cpp-python. It answers each line of JSON with one: {"prefill": prompts} and {"decode": steps} with seconds and the
log-probabilities of the most likely tokens after the last step, per sequence ("copies": n beside one prompt makes n
sequences of it); {"prompts": prompts, "tokens": n} with seconds and the tokens of every greedy answer.

It decodes all sequences together, one llama_batch a step, each with a KV stream of its own and flash attention on.
"""

import argparse
import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np

KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
CHUNK = 2048  # tokens in a llama_decode, llama.cpp's default n_batch


class Context:
    """A model, and KV for `batch` sequences of `length` tokens."""

    def __init__(self, file: str, kv: str, batch: int, length: int, threads: int):
        self.no_log = llama.llama_log_callback(lambda *_: None)  # alive as long as it is called
        llama.llama_log_set(self.no_log, ctypes.c_void_p(0))
        self.model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        params = llama.llama_context_default_params()
        params.n_ctx = batch * (-(-length // 256) * 256)
        params.n_seq_max = batch
        params.n_batch = CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = KV_TYPES[kv]
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context with {kv} and flash attention")
        self.batch = llama.llama_batch_init(CHUNK, 0, 1)
        self.lengths: list[int] = []
        self.logits: list[np.ndarray] = []  # of each sequence; after a step they are llama.cpp's own memory
        self.chosen: list[int] = []  # the most likely token of each

    def answers(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy answers of so many tokens to all prompts together."""
        self.prefill(prompts)
        chosen = [self.chosen]
        while len(chosen) < tokens:
            self.step()
            chosen.append(self.chosen)
        return [list(answer) for answer in zip(*chosen, strict=True)]

    def prefill(self, prompts: list[list[int]]) -> None:
        """Forget all, then compute the prompts."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self.lengths = [len(prompt) for prompt in prompts]
        self.logits = []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), CHUNK):
                part = prompt[start : start + CHUNK]
                self.decode([(token, start + i, sequence) for i, token in enumerate(part)], last_only=True)
            self.logits.append(self.row(self.batch.n_tokens - 1).copy())
        self.choose()

    def copy(self, count: int) -> None:
        """Give each of `count` sequences a copy of the first one's K and V, and its logits."""
        size = llama.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_ubyte * size)()
        llama.llama_state_seq_get_data(self.context, state, size, 0)
        for sequence in range(1, count):
            if not llama.llama_state_seq_set_data(self.context, state, size, sequence):
                raise SystemExit("llama.cpp takes no copy of a sequence")
        self.lengths = self.lengths[:1] * count
        self.logits, self.chosen = self.logits[:1] * count, self.chosen[:1] * count

    def step(self) -> None:
        """The most likely token of each sequence, and its logits after it."""
        self.decode([(token, self.lengths[i], i) for i, token in enumerate(self.chosen)], last_only=False)
        self.lengths = [length + 1 for length in self.lengths]
        self.logits = [self.row(i) for i in range(len(self.chosen))]
        self.choose()

    def choose(self) -> None:
        self.chosen = [int(logits.argmax()) for logits in self.logits]

    def decode(self, rows: list[tuple[int, int, int]], last_only: bool) -> None:
        """One llama_decode of (token, position, sequence)."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = not last_only or i == len(rows) - 1
        status = llama.llama_decode(self.context, self.batch)
        if status:
            raise SystemExit(f"llama_decode failed with status {status}")

    def row(self, i: int) -> np.ndarray:
        logits = llama.llama_get_logits_ith(self.context, i)  # waits for the computation
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary,))

    def top(self, n: int = 100) -> list[dict[int, float]]:
        """The n most likely tokens of each sequence with their log-probabilities, best first."""
        logits = np.stack(self.logits).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-logprobs, -1)[:, :n]
        return [{int(t): float(row[t]) for t in best} for row, best in zip(logprobs, order, strict=True)]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("model")
    cli.add_argument("--kv", choices=KV_TYPES, required=True)
    cli.add_argument("--batch", type=int, required=True)
    cli.add_argument("--length", type=int, required=True, help="tokens of the longest sequence, answer included")
    cli.add_argument("--threads", type=int, required=True)
    args = cli.parse_args()
    context = Context(args.model, args.kv, args.batch, args.length, args.threads)
    system = llama.llama_print_system_info().decode()
    print(json.dumps({"version": llama.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if "prompts" in request:
            tokens = context.answers(request["prompts"], request["tokens"])
            print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)
            continue
        if "prefill" in request:
            context.prefill(request["prefill"])
        if "copies" in request:
            context.copy(request["copies"])
        for _ in range(request.get("decode", 0)):
            context.step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "top": context.top()}), flush=True)


if __name__ == "__main__":
    main()
