"""Tables fit the terminal, and no number in them is cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from octavo.cli.tables import table

NUMBERS = [f"{1234.5 + i:,.1f} ± 1.2e-05" for i in range(6)]


def shown(width: int) -> str:
    found = table("A title that is longer than a narrow table is wide", "batch", "format", *(["of it"] * 6), keys=2)
    found.add_row("8", "int8-token", *NUMBERS, style="bold", end_section=True)
    found.add_row("16", "int4-token", *NUMBERS)
    out = io.StringIO()
    Console(file=out, width=width).print(found)
    return out.getvalue()


@pytest.mark.parametrize("width", [200, 110, 80, 50])
def test_every_number_is_shown_whole_beside_the_names_of_its_row(width: int) -> None:
    lines = shown(width).splitlines()
    assert max(map(len, lines)) <= width
    for name in ("8  int8-token", "16  int4-token"):
        own = "".join(line for line in lines if line.strip().startswith(name))
        assert all(number in own for number in NUMBERS)
    assert "…" not in "".join(lines)


def test_where_there_is_room_it_is_one_table() -> None:
    assert shown(200).count("int8-token") == 1 < shown(80).count("int8-token")


@pytest.mark.parametrize("width", range(52, 84, 4))
def test_where_words_give_way_numbers_do_not(width: int) -> None:
    found = table("Formats", "format", "bytes", "KL ± error", "same top token", "is")
    found.add_row("kv8, uncalibrated", "0.51", NUMBERS[0], "99.4%", "[green]usable[/]")
    out = io.StringIO()
    Console(file=out, width=width).print(found)
    shown = out.getvalue()
    assert all(cell in shown for cell in ("uncalibrated", "0.51", NUMBERS[0], "99.4%", "usable"))
