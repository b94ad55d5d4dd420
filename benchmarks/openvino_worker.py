"""OpenVINO GenAI behind a pipe, in a process of its own: jobs_cpu.py starts it. It answers each line of JSON,
{"prompts": prompts, "tokens": n}, with one: seconds, and the tokens of every greedy answer.

Its continuous batching, KV in 8 bits (`u8`), weights in float16, products in float32: what it computes with on a
processor without bf16.
"""

import argparse
import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("model", help="a GGUF in F16, with its tokenizer")
    cli.add_argument("--batch", type=int, required=True)
    cli.add_argument("--threads", type=int, required=True)
    args = cli.parse_args()

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = args.batch
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    properties = {
        "KV_CACHE_PRECISION": "u8",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": args.threads,
    }
    pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)
    print(json.dumps({"version": genai.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        config = genai.GenerationConfig()
        config.max_new_tokens = request["tokens"]
        config.ignore_eos = True
        config.do_sample = False
        inputs = [ov.Tensor(np.array([prompt])) for prompt in request["prompts"]]
        start = time.perf_counter()
        results = pipeline.generate(inputs, [config] * len(inputs))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": [list(r.m_generation_ids[0]) for r in results]}), flush=True)


if __name__ == "__main__":
    main()
