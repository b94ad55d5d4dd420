"""Octavo as a model of lm-evaluation-harness: the fp32 baseline scores as the harness's own `hf` model does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra octavo[tasks] is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from octavo import LLM, OctavoError, SamplingParams, Unsupported
from octavo.cache.pool import CachePool, Hit
from octavo.measure.candidate import Candidate
from octavo.measure.tasks import HERE, select
from octavo.measure.tasks.harness import OctavoLM
from octavo.measure.tasks.loglikelihood import Request, score
from octavo.measure.tasks.results import key_of
from octavo.measure.tasks.run import load_tasks, quiet
from octavo.models.model import Model
from tests.conftest import slow, tiny_llama
from tests.engine.test_windows import ask, build
from tests.measure.tasks.raw_files import write_raw_files
from tests.models import zoo

CONTEXT = 512

PAIRS = [
    ("The old printer took the sheet", " from the press and folded it."),
    ("The old printer took the sheet", " to the river."),
    ("The old printer took the sheet ", "and"),  # the blank moves over
    ("", "Once upon a time there was a little fox."),
    ("", "Once upon a time there was a little crow."),
    ("Once upon a time", " there"),
    ("word " * 700, "again and again"),  # longer than the context
]


@pytest.fixture(scope="module")
def octavo_lm(pamphlet: Model) -> OctavoLM:
    return OctavoLM(LLM(pamphlet, "fp32", session_len=CONTEXT, max_batch_size=4))


@pytest.fixture(scope="module")
def hf_lm(pamphlet: Model) -> HFLM:
    """The same weights in a module of their own, with transformers' own attention."""
    hf = copy.deepcopy(pamphlet.bound.hf)
    hf.set_attn_implementation("sdpa")
    hf.generation_config.max_new_tokens = None  # else it overrides what tasks ask for
    with quiet():
        return HFLM(pretrained=hf, tokenizer=pamphlet.tokenizer, max_length=CONTEXT, batch_size=4)


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_log_likelihoods_equal_those_of_the_hf_model(octavo_lm: OctavoLM, hf_lm: HFLM) -> None:
    asked = instances("loglikelihood", PAIRS)
    ours, theirs = octavo_lm.loglikelihood(asked, True), hf_lm.loglikelihood(asked, True)
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods_of_texts_longer_than_the_context_are_equal(octavo_lm: OctavoLM, hf_lm: HFLM) -> None:
    asked = instances("loglikelihood_rolling", [("A short text.",), ("The fox ran on and on. " * 120,)])
    ours, theirs = octavo_lm.loglikelihood_rolling(asked, True), hf_lm.loglikelihood_rolling(asked, True)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_generated_answers_are_equal(octavo_lm: OctavoLM, hf_lm: HFLM) -> None:
    asked = instances(
        "generate_until",
        [
            ("Once upon a time there was a", {"until": ["."], "max_gen_toks": 24, "do_sample": False}),
            ("The printer said", {"until": ["\n\n", "and"], "max_gen_toks": 24}),
            ("He looked at the sea. " * 100, {"until": [], "max_gen_toks": 8, "temperature": 0.0}),
        ],
    )
    assert octavo_lm.generate_until(asked, True) == hf_lm.generate_until(asked, True)


@pytest.mark.parametrize(
    "name",
    [
        "winogrande",
        "nq_open",
        "gsm8k",
        "bbh/snarks",
        "openbookqa",
        "openbookqa_fact",
        "eprstmt",
        "crows_pairs",
    ],
)
def test_tasks_give_the_results_of_the_hf_model(name: str, octavo_lm: OctavoLM, hf_lm: HFLM, tmp_path: Path) -> None:
    write_raw_files(tmp_path)
    [part], _ = select(name, tmp_path)
    answers = []
    for lm in (octavo_lm, hf_lm):
        task = load_tasks([part])[part.definition]
        task.set_fewshot_seed(1234)
        task.set_config("num_fewshot", 2 if name == "gsm8k" else 0)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
        with quiet():
            answers.append(evaluate(lm, {"tasks": {task.task_name: task}}, limit=4, bootstrap_iters=0))
    ours, theirs = (answer["results"][part.definition] for answer in answers)
    metrics = [key for key in ours if "," in key and "stderr" not in key]
    assert part.benchmark.metric in metrics
    assert {key: ours[key] for key in metrics} == pytest.approx({key: theirs[key] for key in metrics}, rel=1e-4)
    prompts = [[sample["prompt_hash"] for sample in answer["samples"][part.definition]] for answer in answers]
    assert prompts[0] == prompts[1]


def test_the_tasks_of_ours_load_by_name_in_the_harness(tmp_path: Path) -> None:
    write_raw_files(tmp_path)
    with quiet():
        manager = TaskManager(include_path=HERE, include_defaults=False, metadata={"data_dir": str(tmp_path)})
        [task] = manager.load("eprstmt")["tasks"].values()
    assert len(task.eval_docs) == 4
    assert task.doc_to_text(task.eval_docs[0]) == ' 内容： "很好"。情绪分类：'
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [1, 0, 1, 0]


def test_a_prefix_hit_changes_no_score_and_saves_rows(pamphlet: Model, text_ids: list[int]) -> None:
    llm = LLM(pamphlet, "int8-token", session_len=CONTEXT, max_batch_size=4, max_batch_tokens=256)
    cold = LLM(pamphlet, "int8-token", session_len=CONTEXT, max_batch_size=1, prefix_caching=False)
    contexts = [text_ids[:200], text_ids[:130], text_ids[300:400]]
    requests = [Request(context, text_ids[start : start + 90]) for context in contexts for start in (200, 500, 700)]
    alone = [score(cold.engine, [request])[0] for request in requests]
    written = []
    for _ in range(2):
        before = llm.cache.layers[0].k.written
        together = score(llm.engine, requests)
        written.append(llm.cache.layers[0].k.written - before)
        assert [one.logprob for one in together] == pytest.approx([one.logprob for one in alone], rel=1e-4)
        llm.engine.scheduler.check()
    per_row = pamphlet.bound.shapes[0].kv_heads * pamphlet.bound.shapes[0].k_dim
    rows = sum(len(context) + 89 for context, _ in requests)
    assert written[1] < written[0] < rows * per_row
    assert not llm.engine.pool.groups[0].used


MODELS = {
    "edges": lambda: tiny_llama(max_position_embeddings=256),
    "windows": lambda: build("mixed"),
    "states": lambda: zoo.build("lfm2", max_position_embeddings=256),
}


@pytest.mark.parametrize(
    ("model", "kv"),
    [("edges", "int8-token+edges128"), ("edges", "kv8"), ("windows", "int8-token"), *slow(("states", "kv8"))],
)
def test_what_texts_share_is_computed_once_and_changes_no_score(model: str, kv: str) -> None:
    """Contexts that begin alike, up to the middle of a block; two choices after each."""
    served = Model.of(MODELS[model](), Path(model))
    ids = served.bound.random_tokens(700)
    shared, rest = ids[:150], range(200, 600, 100)
    requests = [Request(shared + ids[at : at + 20], ids[at + n : at + n + 10]) for at in rest for n in (20, 40)]
    sizes = {"session_len": 256, "max_batch_size": 4}
    cold, llm = (LLM(served, kv, **sizes, prefix_caching=caching) for caching in (False, True))
    alone = [score(cold.engine, [one])[0].logprob for one in requests]
    assert [one.logprob for one in score(llm.engine, requests)] == pytest.approx(alone, rel=1e-3)
    llm.engine.scheduler.check()
    [(_, first), *_] = llm.cache.owners
    row = first.k.heads * first.k.dim
    assert first.k.written // row <= len(shared) + len(requests) * 29, "more than its own rows of each, and the shared"


def test_scores_are_those_of_served_generation(pamphlet: Model, text_ids: list[int]) -> None:
    llm = LLM(pamphlet, "int8-token", session_len=CONTEXT)
    [answer] = llm.generate([text_ids[:100]], SamplingParams(max_tokens=20, logprobs=0, ignore_eos=True))
    [scored] = score(llm.engine, [Request(text_ids[:100], answer.token_ids)])
    assert scored.greedy
    assert scored.logprob == pytest.approx(
        sum(s.logprob for s in answer.sampled), rel=1e-3
    )  # a code may round the other way


def test_a_context_in_several_chunks_scores_the_same(pamphlet: Model, text_ids: list[int]) -> None:
    request = Request(text_ids[:300], text_ids[300:420])
    scores = [
        score(LLM(pamphlet, "fp32", session_len=CONTEXT, max_batch_size=1, max_batch_tokens=width).engine, [request])[0]
        for width in (1024, 64)
    ]
    assert scores[0].logprob == pytest.approx(scores[1].logprob, abs=1e-3)


def test_results_are_kept_apart_by_what_the_model_computes_in(
    pamphlet: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor with bf16 units computes bf16 weights in bf16, one without them in float32."""
    write_raw_files(tmp_path)
    [part], _ = select("winogrande", tmp_path)
    keys = []
    for computes in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(pamphlet.bound, "computes", computes)
        keys.append(key_of(pamphlet, Candidate("fp32", pamphlet.bound.raw_format), part, None))
    assert keys[0] != keys[1]


def test_what_cannot_be_run_is_refused(octavo_lm: OctavoLM) -> None:
    with pytest.raises(Unsupported, match="num_beams"):
        octavo_lm.generate_until(instances("generate_until", [("a", {"num_beams": 4})]), True)
    with pytest.raises(OctavoError, match="no room for the question"):
        octavo_lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": CONTEXT})]), True)
    with pytest.raises(OctavoError, match="continuation of 600 tokens"):
        score(octavo_lm.llm.engine, [Request([1], [1] * 600)])


def test_the_harness_knows_octavo_by_name() -> None:
    assert get_model("octavo") is OctavoLM
    lm = get_model("octavo").create_from_arg_string(
        "kv=int8-token,max_length=128,dtype=float32", {"batch_size": "auto", "device": None, "max_batch_size": None}
    )
    assert (str(lm.llm.format), lm.max_length, lm.llm.model.bound.dtype) == ("int8-token", 128, torch.float32)


@pytest.mark.parametrize("kind", ["mixed", "sliding"])
def test_a_window_that_is_shared_leaves_nothing_false_in_the_prefix_cache(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What texts share is longer than the window, and copied where no hit gives it, as in a model with states: its
    first blocks are another text's by then."""
    served = Model.of(build(kind), Path(kind))
    ids = served.bound.random_tokens(1500)
    shared, rest = ids[:300], range(300, 1500, 60)
    requests = [Request(shared + ids[at : at + 20], ids[at + 20 : at + 30]) for at in rest]
    sizes = {"session_len": 512, "max_batch_size": 4, "max_batch_tokens": 64}
    cold, llm = (LLM(served, "fp32", **sizes, prefix_caching=caching) for caching in (False, True))
    alone = [score(cold.engine, [one])[0].logprob for one in requests]
    with monkeypatch.context() as patch:
        patch.setattr(CachePool, "match", lambda pool, _: Hit([], [[] for _ in pool.groups]))
        assert [one.logprob for one in score(llm.engine, requests)] == pytest.approx(alone, rel=1e-3)
    for end in range(65, 300, 64):  # prompts that part from it sooner
        [(expected, _)], [(found, _)] = (ask(one, ids[:end] + ids[700:720], tokens=20) for one in (cold, llm))
        assert found == expected


def test_texts_that_are_read_give_back_what_lies_behind_their_windows() -> None:
    """All texts of a step take more blocks of a window's than there are, had each kept what it was read into."""
    served = Model.of(build("mixed"), Path("mixed"))
    ids = served.bound.random_tokens(16 * 500)
    llm = LLM(served, "fp32", session_len=1024, max_batch_size=16)
    requests = [Request(ids[at : at + 490], ids[at + 490 : at + 500]) for at in range(0, len(ids), 500)]
    assert len(score(llm.engine, requests)) == 16
    llm.engine.scheduler.check()
