"""The tables that verbs print: each file renders one verb's from the value that its --json prints."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text, TextType

# Columns of words.
LEFT = {"", "format", "weights", "kind", "KV", "tokens", "task", "dataset", "metric", "layers", "scale absorbed by"}
BETWEEN = 2  # characters from column to column
LOOK: dict[str, Any] = {
    "title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0),
}  # fmt: skip


class Fitted(Table):
    """A table that is shown in parts where it is wider than the terminal, each with the first `keys` columns, which say
    what a row is about: no number is cut or broken."""

    keys = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in self._parts(options.max_width):
            yield from Table.__rich_console__(part, console, options)

    def _parts(self, width: int) -> Iterator[Table]:
        keys, rest = self.columns[: self.keys], self.columns[self.keys :]
        room = width - sum(map(_width, keys))
        title = self.title
        while rest:
            count, taken = 0, 0
            while count < len(rest) and (not count or taken + _width(rest[count]) <= room):
                taken += _width(rest[count])
                count += 1
            yield self._of([*keys, *rest[:count]], title, width)
            rest, title = rest[count:], None

    def _of(self, columns: Sequence[Column], title: TextType | None, width: int) -> Table:
        part = Table(title=title, **LOOK)
        narrow = sum(map(_wanted, columns)) > width  # then rich would take from the widest columns, numbers too
        for column in columns:
            least, numbers = _width(column) - BETWEEN, column.justify == "right"
            own = least if narrow and numbers else None
            part.add_column(column.header, justify=column.justify, min_width=least, width=own)
        for row, cells in zip(self.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
            part.add_row(*cells, style=row.style, end_section=row.end_section)
        return part


def _width(column: Column) -> int:
    """The least that shows it, with what stands between columns: a cell whole, unless it is of words; of the header the
    longest word."""
    cells = _shown(column)
    if column.justify == "left":
        cells = [word for cell in cells for word in cell.split()]
    return max((cell_len(part) for part in (*str(column.header).split(), *cells)), default=0) + BETWEEN


def _wanted(column: Column) -> int:
    """What shows it without a break."""
    return max(map(cell_len, (*str(column.header).splitlines(), *_shown(column), ""))) + BETWEEN


def _shown(column: Column) -> list[str]:
    """Its cells as they stand on the screen."""
    return [Text.from_markup(str(cell)).plain for cell in column.cells]


def table(title: str, *columns: str, keys: int = 1) -> Table:
    """Empty, with these columns; the first `keys` name a row."""
    found = Fitted(title=title, **LOOK)
    found.keys = keys
    for name in columns:
        found.add_column(name, justify="left" if name in LEFT else "right")
    return found


def listing() -> Table:
    """Empty, for rows of words: what is too wide goes on in its own column, and the first one is never broken."""
    found = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    found.add_column(no_wrap=True)
    return found


def console() -> Console:
    """On stdout."""
    return Console(highlight=False)


def closes(rows: Sequence[Any], i: int, of: str) -> bool:
    """Whether row `i` is the last of its section: the next one differs in its attribute `of`, or there is none."""
    return i + 1 == len(rows) or getattr(rows[i + 1], of) != getattr(rows[i], of)


def mib(n: int | None) -> str:
    """Bytes as MiB, with a decimal where they are few; a dash where there is no number."""
    if n is None:
        return "–"
    size = n / 2**20
    if n % 2**20 == 0 or abs(size) >= 1000:
        return f"{size:,.0f}"
    return f"{size:,.1f}" if abs(size) >= 0.1 else f"{size:.2g}"


def plus_minus(value: float, error: float, format: str, error_format: str | None = None) -> str:
    """value ± its standard error, which a single window or item has not."""
    if not math.isfinite(error):
        return f"{value:{format}}"
    return f"{value:{format}} ± {error:{error_format or format}}"
