"""Who runs in the next step, and with how many tokens.

There are no phases: each running sequence computes as many of its pending tokens as the step's budget allows, one for
a decode, a chunk for a prompt. First come, first served. When blocks run out the latest comer is preempted: its blocks
are freed and it waits, first in line, to be computed again (mostly from the prefix cache, if nobody took its blocks).
"""

from collections import deque
from itertools import islice

from octavo.cache.pool import CachePool, Hit
from octavo.engine.sequence import FinishReason, Sampled, Sequence
from octavo.errors import OctavoError

Work = list[tuple[Sequence, int]]
CHUNK_TOKENS = 1024  # most tokens of a step unless said otherwise, and so rows of a long prompt's chunk


class Scheduler:
    """Decides in `schedule`, changes sequences in `commit`."""

    def __init__(self, pool: CachePool, max_batch_size: int, max_batch_tokens: int, max_context: int):
        self.pool = pool
        self.max_batch_size = max_batch_size  # sequences in a step
        self.max_batch_tokens = max(max_batch_tokens, max_batch_size)  # tokens in a step
        self.max_context = max_context if pool.capacity is None else min(max_context, pool.capacity)
        self.cache_limited = self.max_context < max_context
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises OctavoError if it can never fit."""
        self.expect_room(sequence)
        sequence.max_len = min(sequence.num_prompt + sequence.params.max_tokens, self.max_context)
        self.waiting.append(sequence)

    def expect_room(self, sequence: Sequence) -> None:
        """Raise OctavoError if a sequence can never fit."""
        if sequence.num_prompt == 0:
            raise OctavoError("the prompt is empty: it has no token to start from", "prompt", "empty_prompt")
        if sequence.num_prompt >= self.max_context:
            limit = (
                f"the KV cache holds {self.max_context} tokens (enlarge it with --kv-cache-memory)"
                if self.cache_limited
                else f"a session holds {self.max_context} (--session-len, or the model's own context)"
            )
            message = f"the prompt has {sequence.num_prompt} tokens and the answer needs room too, but {limit}"
            raise OctavoError(message, "prompt", "context_length_exceeded")

    def schedule(self) -> Work:
        """The next step's work. Takes blocks and, if they run out, preempts."""
        work: Work = []
        budget = self.max_batch_tokens
        preempted = False
        for sequence in list(self.running):
            if preempted and sequence not in self.running:  # preempted above, to make room for an older one
                continue
            tokens = self._tokens(sequence, budget)
            while not self.pool.reserve(sequence, tokens):
                preempted = True
                self._preempt(self.running[-1])
                if sequence not in self.running:
                    break
            else:
                if tokens:
                    work.append((sequence, tokens))
                    budget -= tokens
        # After a preemption nobody starts: the blocks it freed are for those who run.
        while self.waiting and budget and len(self.running) < self.max_batch_size and not preempted:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            tokens = self._tokens(sequence, budget)
            reserved = self.pool.reserve(sequence, tokens)
            assert reserved, "a sequence was admitted without room"
            work.append((sequence, tokens))
            budget -= tokens
        return work

    def following(self, work: Work) -> Work | None:
        """The step after `work`, which is not committed yet, if it is certain: the same sequences, each with the token
        it is about to gain. None if one of them ends by its length, if its next token depends on those it has generated
        (penalties, a grammar, min_tokens), if it still has a prompt to compute, if another one waits and could run, or
        if blocks run out. Takes blocks."""
        room = len(self.running) < self.max_batch_size
        if len(work) < len(self.running) or (room and self.waiting and self._may_start(self.waiting[0])):
            return None
        needed = [0] * len(self.pool.groups)
        for sequence, tokens in work:
            length = len(sequence.tokens) + 1  # once `work` is committed
            if sequence.finished or tokens < sequence.pending or length >= sequence.max_len:
                return None
            if sequence.looks_back:
                return None
            needed = [a + b for a, b in zip(needed, self.pool.lacking(sequence, length), strict=True)]
        if self._too_few(needed):
            return None
        for sequence, _ in work:
            self.pool.reserve(sequence, sequence.pending + 1)
        return [(sequence, 1) for sequence, _ in work]

    def launched(self, work: Work, ahead: bool = False) -> None:
        """The forward of a step is launched; `ahead`: before the step before it is committed. Takes snapshots of the
        states at its end."""
        if self.pool.states is not None:
            for sequence, tokens in work:
                length = len(sequence.tokens) + 1 if ahead else sequence.num_cached + tokens
                self.pool.states.launched(sequence, length)

    def commit(self, work: Work, sampled: list[Sampled]) -> list[Sequence]:
        """Take in what a step computed; returns the sequences that gained a token, or failed to. `sampled` is in the
        order of those whose last pending token was computed. One that has ended since the step was launched gains
        nothing."""
        results = iter(sampled)
        gained = []
        for sequence, tokens in work:
            if sequence.finished:
                next(results)  # dropped; it has just one: only decode steps are launched ahead of a commit
                if self.pool.states is not None:
                    self.pool.states.forget_coming(sequence)
                continue
            sequence.num_cached += tokens
            self.pool.seal_full(sequence)
            if self.pool.states is not None:
                self.pool.states.taken_in(sequence)
            if sequence.lacks_first and sequence.num_cached == self.pool.block_size:
                self._skip(sequence)
            if sequence.pending:
                continue
            result = next(results)
            gained.append(sequence)
            if result.error is not None:
                sequence.error = result.error
                self.finish(sequence, "error")
                continue
            sequence.tokens.append(result.token)
            sequence.sampled.append(result)
            if sequence.guide:
                sequence.guide.accept(result.token)
            if result.token in sequence.stop_ids:
                self.finish(sequence, "length" if sequence.guide and sequence.guide.cut else "stop")
            elif len(sequence.tokens) >= sequence.max_len:
                self.finish(sequence, "length")
        return gained

    def restart(self) -> None:
        """Preempt all that run: they are computed again."""
        if self.pool.states is not None:
            self.pool.states.forget_all_coming()
        while self.running:
            self._preempt(self.running[-1])

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is and free its blocks."""
        if sequence.finished:
            return
        sequence.finish_reason = reason
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.free_all(sequence)
        else:
            self.waiting.remove(sequence)
        if self.pool.states is not None:
            self.pool.states.finish(sequence)

    def check(self) -> None:
        """The pool is whole, and the references are exactly those of the running sequences' block tables."""
        self.pool.check_held(self.running)
        assert not any(sequence.tables for sequence in self.waiting), "a waiting sequence holds blocks"

    def _tokens(self, sequence: Sequence, budget: int) -> int:
        """How many tokens a sequence computes in this step: what the budget allows, or those until a snapshot of its
        states is due, or those of a first page after which it can skip."""
        tokens = min(sequence.pending, budget)
        if sequence.lacks_first:
            tokens = min(tokens, self.pool.block_size - sequence.num_cached)
        return tokens if self.pool.states is None else self.pool.states.until_mark(sequence, tokens)

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence on its cached prefix, if it can start now."""
        hit = self._prefix(sequence)
        if hit is None:
            return False
        self.pool.start(sequence, hit)
        sequence.lacks_first = hit.lacks_first
        if self.pool.states is not None:
            self.pool.states.part(sequence, islice(self.waiting, 1, self.max_batch_size))
        if not sequence.preemptions:
            sequence.prefix_hit = sequence.num_cached
        return True

    def _skip(self, sequence: Sequence) -> None:
        """Go on from what is cached of a sequence's prefix: its first page, which it lacked, is computed."""
        sequence.lacks_first, computed = False, sequence.num_cached
        if not self.pool.skip(sequence):
            return
        if self.pool.states is not None:
            self.pool.states.part(sequence, islice(self.waiting, self.max_batch_size))
        if not sequence.preemptions:
            sequence.prefix_hit = sequence.num_cached - computed

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether `_admit` would start it."""
        hit = self._prefix(sequence)
        if hit is not None:
            self.pool.unmatch(hit)
        return hit is not None

    def _prefix(self, sequence: Sequence) -> Hit | None:
        """Take the cached blocks that a waiting sequence starts on; None if it must wait: there is no room for all its
        tokens, or somebody who runs is about to compute more of its prefix."""
        hit = self.pool.match(sequence.tokens)
        missing = self.pool.blocks_for(len(sequence.tokens)) - len(hit)
        step = self.pool.blocks_for(self.max_batch_tokens) + 1
        # Where blocks behind a window are given back, those of a step are enough.
        needed = [missing if pool.reach is None else min(missing, step) for pool in self.pool.groups]
        if self._too_few(needed) or self._comes(sequence, len(hit)):
            self.pool.unmatch(hit)
            return None
        return hit

    def _too_few(self, needed: list[int]) -> bool:
        return any(count > len(pool.free) for count, pool in zip(needed, self.pool.groups, strict=True))

    def _comes(self, sequence: Sequence, hits: int) -> bool:
        """Whether a running sequence is computing the block that comes after the `hits` found: to wait for it, a step
        or the chunks of its prompt, costs less than to compute it twice."""
        if self.pool.states is not None:
            return self.pool.states.comes(sequence, hits * self.pool.block_size, self.running)
        end = (hits + 1) * self.pool.block_size
        if end >= len(sequence.tokens) or not self.pool.prefix_caching:
            return False
        return any(
            other.num_cached < end <= other.num_prompt and other.tokens[:end] == sequence.tokens[:end]
            for other in self.running
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free_all(sequence)
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)
