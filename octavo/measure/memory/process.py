"""One point of the memory table: load a model, fill every session to its context, take one step of all, look.

It runs in a process of its own, so that what one point leaves behind does not pollute the next:

    load the weights → warm up → [forget the peak] → make the cache, fill it → one decode step of all sessions → look
"""

import signal
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers.utils import logging

from octavo import cores
from octavo.cache.holding import Holding
from octavo.calibrate import calibrate
from octavo.devices import Device, device_of
from octavo.errors import OctavoError, one_line
from octavo.llm import LLM
from octavo.measure.memory.fill import fill
from octavo.models.load import load_model
from octavo.models.model import Model
from octavo.models.packed import weight_bytes
from octavo.quant.format import Format
from octavo.units import format_bytes

WARM_UP = 64  # tokens
OVERHEAD = 1 << 30  # bytes beside weights and cache: Python, its libraries, activations


class CannotMeasure(Exception):
    """Why a point was not measured."""


@dataclass(frozen=True)
class Source:
    """A model to measure, and for how long it may fill sessions by itself."""

    path: Path  # a directory, or with dummy weights a config.json alone
    dtype: str = "auto"
    device: str = "cpu"
    load_format: str = "auto"
    model_format: str = "hf"
    fill_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.load_format not in ("auto", "dummy"):
            raise OctavoError(f"the load format {self.load_format!r} is unknown: choose auto or dummy")

    def load(self, context: int) -> Model:
        """The model as it is served, but without a tokenizer: it is shown random tokens only."""
        hf = load_model(
            self.path,
            dtype=self.dtype,
            device=self.device,
            load_format=self.load_format,
            model_format=self.model_format,
        )
        return Model.of(hf, self.path, context, hf.dtype if self.dtype != "auto" else None)


@dataclass(frozen=True)
class Request:
    """How many sessions of the source's model to fill. `weights` and `cache` are bytes, as computed."""

    source: Source
    format: Format
    batch: int
    context: int
    weights: int
    cache: int


@dataclass(frozen=True)
class Filled:
    """Bytes found. `weights`, `cache` and `static` are the tensors' own sizes, `peak` is the device's."""

    weights: int
    cache: int
    static: int
    peak: int  # most since the warm-up. CPU: resident set of the process, CUDA: PyTorch's allocator
    settled: int  # the same at the end
    before: int  # CPU: resident set before the model was loaded; CUDA: 0
    driver: int | None  # CUDA: in use on the whole device by the driver's count, other processes included
    by_model: int  # tokens that the model wrote; the others are random rows


def measure(request: Request) -> Filled:
    """Measure in a fresh process; raises CannotMeasure where the memory is too small for it."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, request), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        raise CannotMeasure(f"the process that measured it died, {_how(process.exitcode or 0)}") from None
    finally:
        process.terminate()
        process.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _how(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "killed by the system, as it does when memory runs out"
    return f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"


def _answer(pipe: Connection, request: Request) -> None:
    found: Filled | BaseException
    try:
        found = fill_and_look(request)
    except (Exception, KeyboardInterrupt) as error:
        found = error
    with suppress(OSError):  # nobody listens any more
        pipe.send(found)


def fill_and_look(request: Request) -> Filled:
    """The measurement; expects a process that has done nothing else."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with suppress(OSError):  # should memory run out all the same, this process is to go and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    device = device_of(torch.device(request.source.device))
    before = device.taken()
    need = OVERHEAD + (request.weights + request.cache) * 21 // 20
    if need > (free := device.free_memory()):
        raise CannotMeasure(f"it needs {format_bytes(need)} and {format_bytes(free)} are free here")
    try:
        return _fill_and_look(request, device, before)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CannotMeasure(f"memory ran out: {one_line(error)}") from None


def _fill_and_look(request: Request, device: Device, before: int) -> Filled:
    cores.use()
    model = request.source.load(request.context)
    # The ranges of one random batch: which ones they are changes no byte. For raw formats it is a warm-up.
    warm_up = model.bound.random_tokens(1, min(WARM_UP, request.context))
    calibration = calibrate(model, warm_up, dataset="synthetic") if model.bound.shapes else None
    device.forget_peak()

    llm = LLM(
        model,
        request.format,
        calibration=calibration,
        session_len=request.context,
        max_batch_size=request.batch,
        kv_cache_memory=request.cache,
        prefix_caching=False,
    )
    pool = llm.engine.pool
    sessions = [Holding(tokens=model.bound.random_tokens(request.context, seed=i)) for i in range(request.batch)]
    for session in sessions:
        pool.start(session, pool.match(session.tokens))
    by_model = fill(llm, sessions, request.source.fill_seconds)
    for store in llm.cache.stores:
        if store.written != request.batch * request.context * store.heads * store.dim:
            raise AssertionError(f"{store.written} values were written: the sessions are not full")
    settled = device.taken()
    return Filled(
        weights=weight_bytes(model.bound.hf),
        cache=llm.cache.nbytes,
        static=llm.cache.memory().static,
        peak=device.peak(),
        settled=settled,
        before=before,
        driver=device.in_use(),
        by_model=by_model,
    )
