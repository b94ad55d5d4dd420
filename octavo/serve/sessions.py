"""Conversations that outlive the server: their quantized blocks in a directory, found again by the prompt's prefix.

A conversation that has been quiet for a while is saved, and all are when the server stops. A request whose prompt
begins with a saved one has its blocks put back first, and is not prefilled. The engine's thread only copies blocks
between two steps; files are read and written beside it. What is wrong with a file costs a warning, never a request.

Several servers may share a directory: each then looks for what the others have saved and removed.

The index is the event loop's alone. A conversation that went on replaces what was saved of it; beyond `limit` bytes the
least recently used files go. Only files that bear this model's and format's own kind of name are ever touched.
"""

import asyncio
import logging
import os
import time
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from contextlib import suppress
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from shutil import rmtree

from octavo.artefact import PART, Damaged
from octavo.cache import session
from octavo.cache.session import Copies, SavedSession
from octavo.errors import OctavoError
from octavo.llm import LLM
from octavo.serve.worker import Worker
from octavo.units import format_bytes

logger = logging.getLogger("octavo")
QUIET = 5.0  # seconds without a request after which a conversation is saved
STALE = 3600.0  # seconds after which nobody writes any more to a file that is not complete
MOST_FRESH = 1024  # conversations that wait to be saved; where they come faster than the disk takes them, some are not
ANY = "[0-9a-f]" * 32  # a glob of every hash


class Exchanged(OctavoError):
    """A file does not hold the conversation that its name says."""


class SessionDir:
    """The saved sessions of one server, or with `shared` of several that use the directory at a time."""

    def __init__(self, path: Path, limit: int, llm: LLM, shared: bool = False):
        self.path, self.limit, self.shared = path, limit, shared
        self.cache, self.pool, self.identity = llm.cache, llm.engine.pool, llm.session_identity
        self.vocab_size = llm.model.bound.vocab_size
        self.kind = sha256(repr(self.identity).encode()).hexdigest()[:8]  # of two formats in one directory
        self.sizes: dict[Path, int] = {}  # of every file, least recently used first
        self.chains: dict[Path, list[bytes]] = {}  # of every file, the hashes of its prefixes
        self.index: dict[bytes, dict[Path, None]] = {}  # such a hash → the files that have its block
        self.fresh: dict[bytes, tuple[Tokens[int], float]] = {}  # last hash → tokens not yet saved, and when they ended
        self.strange: set[Path] = set()  # files that are left alone
        self.restored_tokens = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
            for unfinished in path.glob(f".{self._name(ANY)}.*{PART}"):
                if not shared or time.time() - unfinished.stat().st_mtime > STALE:  # a server was killed as it wrote
                    rmtree(unfinished, ignore_errors=True)
            found = sorted(path.glob(self._name(ANY)), key=lambda file: file.stat().st_mtime)
        except OSError as error:
            raise OctavoError(f"--session-dir {path} cannot be used: {error.strerror}") from None
        for file in found:
            self._take_in(file, self._open(file))
        self._shrink()

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def remember(self, tokens: Tokens[int]) -> None:
        """A conversation has ended its turn."""
        chain = self._chain(tokens)
        if not chain or chain[-1] in self.index:
            return
        for earlier in chain:
            self.fresh.pop(earlier, None)
        self.fresh[chain[-1]] = (tokens, time.monotonic())
        if len(self.fresh) > MOST_FRESH:
            del self.fresh[next(iter(self.fresh))]

    async def keep(self, worker: Worker, stop: asyncio.Event) -> None:
        """Save what has become quiet, and at the stop the rest."""
        while not stop.is_set():
            await self.save(worker, QUIET)
            if self.shared:
                await self.look()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), QUIET / 5)
        await self.save(worker)

    async def save(self, worker: Worker, quiet: float = 0.0) -> None:
        """Save the conversations that ended their turn `quiet` seconds ago or earlier, as far as they are cached."""
        ended = time.monotonic() - quiet
        for last, (tokens, at) in list(self.fresh.items()):
            if at <= ended and last in self.fresh:  # it has not gone on while another was written
                try:
                    await self._save(worker, tokens)
                except Exception as error:  # the disk is full, a step is failing: the next may do
                    logger.warning("a conversation is not saved in %s until its next turn: %s", self.path, error)
                self.fresh.pop(last, None)

    async def look(self) -> None:
        """Take in what other servers have saved here, and forget what they have removed."""
        known = {*self.sizes, *self.strange}
        there = await asyncio.to_thread(lambda: set(self.path.glob(self._name(ANY))))
        self.strange &= there
        self._forget([file for file in known - there if file in self.sizes])
        for file in there - known - self.sizes.keys():
            self._take_in(file, await asyncio.to_thread(self._open, file))
        self._shrink()

    async def restore(self, worker: Worker, tokens: Tokens[int]) -> None:
        """Put back what is saved of a prompt and not cached."""
        # With a prefix its own prefixes are in the index: the first that is not ends the search.
        known = list(takewhile(self.index.__contains__, (prefix for prefix, _ in self.pool.prefixes(tokens))))
        while known and self._having(known[-1]) is None:
            known.pop()
        if not known or (file := self._having(known[-1])) is None:
            return
        blocks = len(known)
        if blocks <= await worker.call(lambda llm: len(llm.engine.pool.find(tokens))):
            return
        try:
            prefix = tokens[: blocks * self.pool.block_size + 1]
            copies = await asyncio.to_thread(self._read, file, prefix)
            before, after = await worker.call(lambda llm: _paste(llm, prefix, copies))
        except Exception as error:  # whatever a file can hold, the request goes on without it
            logger.warning("a saved session is not used, and its prompt computed again: %s", error)
            if isinstance(error, Damaged):
                self._remove([file])
            elif isinstance(error, Exchanged) or not os.path.exists(file):
                self._forget([file])
            return
        self.restored_tokens += (after - before) * self.pool.block_size
        self._touch(file)

    async def _save(self, worker: Worker, tokens: Tokens[int]) -> None:
        copies = await worker.call(lambda llm: session.copy_prefix(llm.cache, llm.engine.pool, tokens))
        codes = await asyncio.to_thread(session.to_rows, self.cache, copies)
        tokens = tokens[: session.rows(codes) + 1]
        chain = self._chain(tokens)
        if not chain or chain[-1] in self.index:
            return
        if (size := sum(rows.nbytes for rows in codes.values())) > self.limit:
            raise OctavoError(f"it takes {format_bytes(size)}, and all may take {format_bytes(self.limit)}")
        file = self._file(chain[-1])
        written = await asyncio.to_thread(session.save, file, tokens, codes, self.identity)
        self._add(file, written, chain)
        self._remove([old for prefix in chain[:-1] if (old := self._file(prefix)) in self.sizes])
        self._shrink()

    def _read(self, file: Path, prefix: Tokens[int]) -> Copies:
        saved = SavedSession.open(file)
        saved.check(self.identity, self.vocab_size)
        shared = len(prefix) - 1
        if saved.tokens[:shared] != list(prefix[:shared]):  # files can be renamed while the server runs
            raise Exchanged(f"{file}: holds another conversation than its name says")
        return session.to_blocks(self.cache, saved.codes(self.cache))

    def _open(self, file: Path) -> tuple[int, list[bytes]] | OctavoError | OSError:
        """Size and hashes of a file that this server has not written, or why it is of no use."""
        try:
            saved, size = SavedSession.open(file), file.stat().st_size
            saved.check(self.identity, self.vocab_size)
            return size, self._chain(saved.tokens)
        except (OctavoError, OSError) as error:
            return error

    def _take_in(self, file: Path, found: tuple[int, list[bytes]] | OctavoError | OSError) -> None:
        if isinstance(found, tuple):
            self._add(file, *found)
        elif isinstance(found, Damaged):
            logger.warning("a saved session is removed: %s", found)
            self._remove([file])
        else:
            logger.warning("a saved session is left alone: %s", found)
            self.strange.add(file)

    def _add(self, file: Path, size: int, chain: list[bytes]) -> None:
        self._forget([file])
        self.sizes[file], self.chains[file] = size, chain
        for prefix in chain:
            self.index.setdefault(prefix, {})[file] = None

    def _remove(self, files: Collection[Path]) -> None:
        for file in files:
            with suppress(OSError):
                file.unlink()
        self._forget(files)

    def _forget(self, files: Collection[Path]) -> None:
        """Leave files alone from now on."""
        for file in files:
            self.sizes.pop(file, None)
            for prefix in self.chains.pop(file, ()):
                del self.index[prefix][file]  # others may have this block too
                if not self.index[prefix]:
                    del self.index[prefix]

    def _touch(self, file: Path) -> None:
        """Its use is remembered over restarts too."""
        if file in self.sizes:
            self.sizes[file] = self.sizes.pop(file)
            with suppress(OSError):
                os.utime(file)

    def _shrink(self) -> None:
        """Keep the most recently used that fit. One that is too large alone costs no other its place."""
        room, gone = self.limit, []
        for file, size in reversed(self.sizes.items()):
            if size <= room:
                room -= size
            else:
                gone.append(file)
        self._remove(gone)

    def _having(self, prefix: bytes) -> Path | None:
        """A file that has the blocks of a prefix. Where layers keep states, of which a file has those at its end alone,
        one that ends with it."""
        if self.pool.states is None:
            return next(iter(self.index.get(prefix, ())), None)
        return file if (file := self._file(prefix)) in self.sizes else None

    def _file(self, last: bytes) -> Path:
        """Of the conversation whose last hash that is."""
        return self.path / self._name(last.hex())

    def _name(self, last: str) -> str:
        """Of a file, by its last hash."""
        return f"{last}.{self.kind}.session"

    def _chain(self, tokens: Tokens[int]) -> list[bytes]:
        return [prefix for prefix, _ in self.pool.prefixes(tokens)]


def _paste(llm: LLM, tokens: Tokens[int], copies: Copies) -> tuple[int, int]:
    """Blocks of `tokens` that are cached before and after."""
    pool = llm.engine.pool
    before = len(pool.find(tokens))
    session.paste_prefix(llm.cache, pool, tokens, copies)
    return before, len(pool.find(tokens))
