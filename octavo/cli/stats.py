"""`/stats`: the bytes of a conversation in its cache's format, beside what 16 bits would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from octavo.cli.conversation import Conversation


def show(conversation: Conversation, console: Console) -> None:
    from octavo.units import format_bytes

    llm, here = conversation.llm, conversation.footprint()
    size, cache, whole_16 = here.size, llm.cache, here.size_16.of_blocks(llm.cache.blocks)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(here.format, justify="right", style="bold")
    table.add_column("16 bits", justify="right")
    table.add_row("bytes per token", f"{size.token:,}", f"{here.size_16.token:,}")
    table.add_row("this conversation", format_bytes(here.nbytes), format_bytes(here.nbytes_16))
    table.add_row("the whole cache", format_bytes(cache.nbytes), format_bytes(whole_16))
    memory = cache.memory()
    if memory.raw:
        table.add_row("raw rows at edges, in the above", format_bytes(memory.raw), "")
    if memory.padding:
        table.add_row("padding, in the above", format_bytes(memory.padding), "")
    if memory.static:
        table.add_row("calibrated ranges", format_bytes(memory.static), "")
    console.print(table)

    facts = Table.grid(padding=(0, 3, 0, 0))
    facts.add_row("tokens", f"{here.tokens:,} of {conversation.capacity:,}")
    if here.blocks:
        filled = f"the last one holds {here.last_block}" if here.last_block < size.block_size else "all of them full"
        facts.add_row("blocks", f"{here.blocks} of {cache.num_blocks:,}, of {size.block_size} tokens each; {filled}")
    if (last := conversation.last) and last.cached_tokens is not None:
        found = f"{last.cached_tokens:,} of its {last.prompt_tokens:,} tokens were in the cache already"
        facts.add_row("last prompt", f"{found} ({last.cached_tokens / last.prompt_tokens:.0%})")
    if llm.format.takes_calibration:
        share, where = llm.cache.worst_saturation()
        facts.add_row("out of range", f"at most {share:.2%} of the values ({where})" if share else "no value")
    console.print(facts)
    console.print()
