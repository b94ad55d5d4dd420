"""What `/params` and `/stats` print in a chat."""

from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octavo.cli.conversation import Conversation
from octavo.cli.tables import listing
from octavo.engine.params import DEFAULTS, allowed
from octavo.units import format_bytes

ALWAYS = ("max_tokens", "temperature")  # others are shown where they change something


def show_params(conversation: Conversation, given: Collection[str], console: Console) -> None:
    """Every parameter that changes what is drawn or shown, and who has set it. `given` are those that the command line
    has set."""
    params, llm = conversation.params, conversation.llm
    model = llm.default_params
    asked = {"max_tokens" if name == "max_new_tokens" else name for name in llm.model.generation}
    rows = listing()
    for name in allowed("command line"):
        value = getattr(params, name)
        if value == DEFAULTS[name] and name not in (*ALWAYS, *given):
            continue
        if name in given:
            source = "the command line"
        elif name in asked and value == getattr(model, name):
            source = "the model's generation config"
        elif name == "max_tokens" and value == llm.session_len:
            source = "what a session holds"
        else:
            source = "default"
        rows.add_row(f"[bold]{name}[/]", escape(_shown(name, value)), f"({source})")
    console.print(rows)


def _shown(name: str, value: object) -> str:
    if name == "temperature" and not value:
        return "0: greedy, always the most likely token"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def show_stats(conversation: Conversation, console: Console) -> None:
    """The bytes of a conversation in its cache's format, beside what 16 bits would take."""
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
