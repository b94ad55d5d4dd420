"""A rank that ends, ends the model with one error; what cannot be divided is refused by name before it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from octavo.engine.params import SamplingParams
from octavo.engine.threads import EngineFailed
from octavo.errors import OctavoError, Unsupported
from octavo.llm import LLM
from octavo.models.model import Model
from octavo.parallel import load, ranks
from octavo.parallel.division import ByPlan
from octavo.parallel.model import ParallelModel
from octavo.parallel.ranks import Ranks
from tests.parallel.models import alone, divided, tiny


def of(count: int) -> ByPlan:
    return ByPlan(Ranks(0, count, count, None, b""))  # type: ignore[arg-type]  # it is not asked for anything


def test_heads_that_the_ranks_do_not_divide_are_refused_with_numbers_that_do():
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(Unsupported, match=r"9 query and 3 KV heads of llama .* among 2 ranks: use 3 or 9"):
        of(2).arguments(LlamaForCausalLM, config)


def test_a_model_without_a_plan_is_refused_by_name():
    with pytest.raises(Unsupported, match="no tensor-parallel plan for gpt2"):
        of(2).arguments(GPT2LMHeadModel, GPT2Config())


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"device_map": "auto"}, "device map"),
        ({"load_format": "dummy"}, "dummy weights"),
    ],
)
def test_options_that_do_not_go_together_with_ranks_are_refused(option: dict[str, object], named: str):
    with pytest.raises(Unsupported, match=named):
        load(None, 2, device="cpu", **option)


@pytest.mark.parametrize("ranks", [0, 65])
def test_a_number_of_ranks_that_cannot_be_is_refused(ranks: int):
    with pytest.raises(OctavoError, match="tensor_parallel_size"):
        LLM(tensor_parallel_size=ranks)


def test_a_command_that_rank_0_has_not_signed_is_not_run():
    store, ran = dist.HashStore(), []

    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return ran.append, (1,)

    first, second = (Ranks(rank, 2, 2, store, b"a secret") for rank in (0, 1))  # type: ignore[arg-type]
    first.send("step", 1)
    assert second.receive() == ("step", (1,))
    other = Ranks(0, 2, 2, store, b"a guess")  # type: ignore[arg-type]
    other.send("step", 1)
    other.send("harm", Harmful())
    with pytest.raises(OctavoError, match="not signed by rank 0"):
        second.receive()
    assert not ran


def test_ranks_of_torchrun_without_a_key_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Commands signed with an empty key could be anybody's."""
    for name, value in {"TORCHELASTIC_RUN_ID": "a run", "RANK": "0", "WORLD_SIZE": "2", ranks.KEY: ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(OctavoError, match=r"OCTAVO_RANKS_KEY is not set.*Before torchrun, export OCTAVO_RANKS_KEY="):
        load(None, 2, device="cpu")


def test_a_cache_that_is_collected_while_others_are_told_of_is_told_of_too():
    """At any moment: here when the list of those before it is read or emptied."""

    class Late(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield from [*super().__reversed__()]
            self.append(2)

        def pop(self, *where: Any) -> int:
            if (number := super().pop(*where)) == 1:
                self.append(2)
            return number

    sent: list[tuple[Any, ...]] = []
    model = ParallelModel.__new__(ParallelModel)
    model.turn, model.ranks = RLock(), SimpleNamespace(send=lambda *command: sent.append(command))  # type: ignore[assignment]
    model.commands, model.dropped = {"free": lambda: 0}, Late([1])
    model.together("free")
    model.together("free")
    told = [number for command, *rest in sent if command == "drop" for number in rest[0]]
    assert sorted(told) == [1, 2]


@pytest.mark.slow
def test_killed_ranks_end_every_answer_with_one_error_in_ten_seconds(tmp_path: Path, slowly):
    """Each time in the middle of an answer: the answers' error names the rank, and later calls have it too."""
    path = tiny(tmp_path, 2)
    for time_of_death in range(slowly(20)):
        with divided(path) as model:
            llm = LLM(model, "int8-token", session_len=512)
            children = [child.pid for child in _children(model)]
            pieces = llm.generate(["a b c"] * 3, SamplingParams(max_tokens=400, ignore_eos=True), stream=True)
            for _ in range(1 + 3 * time_of_death):
                next(pieces)
            begun = time.monotonic()
            os.kill(children[0], signal.SIGKILL)
            with pytest.raises(EngineFailed, match="rank 1 of 2 was killed by SIGKILL"):
                for _ in pieces:
                    pass
            with pytest.raises(EngineFailed, match="rank 1"):
                llm.generate(["again"])
            assert time.monotonic() - begun < 10


class Endless:
    """A rank that reads it as a command is in a loop of Python ever after."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("while True: pass",)


def stopped(model: Model) -> None:
    os.kill(_children(model)[0].pid, signal.SIGSTOP)


def looping(model: Model) -> None:
    bound: Any = model.bound
    with bound.turn:
        bound.ranks.send("step", Endless())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stand_still", "seen"), [(stopped, "has given no sign of life for 3 s"), (looping, "has not got on for 5 s")]
)
def test_a_rank_that_stands_still_ends_the_engine(
    stand_still: Callable[[Model], None], seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of an answer. Stopped, it gives no sign of life; in an endless loop it does, but does not come to
    where rank 0 waits. Neither breaks a connection."""
    monkeypatch.setattr(ranks, "MISSED", 3)
    monkeypatch.setattr(ranks, "STUCK", 5)
    with divided(tiny(tmp_path, 2)) as model:
        llm = LLM(model, "int8-token", session_len=512)
        pieces = llm.generate(["a b c"] * 3, SamplingParams(max_tokens=400, ignore_eos=True), stream=True)
        next(pieces)
        stand_still(model)
        with pytest.raises(EngineFailed, match=f"rank 1 of 2 .*{seen}"):
            for _ in pieces:
                pass
        with pytest.raises(EngineFailed, match="rank 1"):
            llm.generate(["again"])
        assert _children(model)[0].wait(10) == -signal.SIGKILL


@pytest.mark.slow
def test_the_other_ranks_end_with_rank_0(tmp_path: Path):
    """Killed, it can tell nobody."""
    path = tiny(tmp_path, 2)
    program = (
        "import sys, time; from octavo.parallel import load; from tests.parallel.test_failures import _children\n"
        f"model = load({str(path)!r}, 2, device='cpu', dtype='float32')\n"
        "print(_children(model)[0].pid, flush=True); time.sleep(600)"
    )
    rank_0 = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert rank_0.stdout is not None
    follower = int(rank_0.stdout.readline())
    rank_0.kill()
    rank_0.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{follower}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{follower}").exists()


@pytest.mark.slow
def test_weights_that_a_rank_cannot_read_are_one_error(tmp_path: Path):
    path = tiny(tmp_path, 2)
    (path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(OctavoError, match=r"model\.safetensors is incomplete"):
        load(path, 2, device="cpu", dtype="float32")
    assert alone(tiny(tmp_path, 2)).bound.layers, "and the process can load another model"


def _children(model) -> list[subprocess.Popen[bytes]]:
    return model.bound.ranks.processes
