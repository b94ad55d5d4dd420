"""The report: one page that needs nothing else, whose numbers are those that were measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")

from octavo.errors import OctavoError, install
from octavo.measure.budget import Windows
from octavo.measure.doctor import diagnose as doctor
from octavo.measure.memory.costs import Cost
from octavo.measure.report import combinations, plots, sizes, svg
from octavo.measure.report.page import numbers, prose, render, scientific
from octavo.measure.report.picture import require_directory
from octavo.measure.report.survey import Survey, gather
from octavo.measure.speed import roofline
from octavo.models.model import Model
from octavo.quant.format import KVFormat

VOID = {"meta", "br", "link", "img", "hr", "input"}


@pytest.fixture(scope="module")
def written(pamphlet: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Survey, Path]:
    """A report on the bundled model, in sizes that take seconds."""
    small = {
        sizes: {"COMPARED": Windows(2, 128), "CALIBRATED": Windows(2, 64), "LONGEST": 512, "SHORTEST": 512,
                "TIMED": (((1, 2), 64),)},
        combinations: {"TOKENS": 2, "ROUNDS": 1},
        doctor: {"WANTED": Windows(2, 64), "LEAST": Windows(2, 64), "CALIBRATED": 2},
        roofline: {"READ_BYTES": 1 << 20},
    }  # fmt: skip
    directory = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        for module, values in small.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        found = gather(pamphlet, memory=8 << 30)
        require_directory(directory)
        render(found, directory)
        return found, directory


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects ids and what is fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.uses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._look(dict(attrs))

    def handle_startendtag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _look(self, attributes: dict[str, str | None]) -> None:
        if (name := attributes.get("id")) is not None:
            self.ids.append(name)
        for key in ("src", "href", "xlink:href", "data", "action", "srcset"):
            if (value := attributes.get(key)) is not None:
                (self.uses if value.startswith("#") else self.fetched).append(value)


def test_the_page_is_whole_html_and_fetches_nothing(written: tuple[Survey, Path]) -> None:
    text = (written[1] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", text))
    assert len(page.ids) == len(set(page.ids)), "two figures share an id"
    references = {use[1:] for use in page.uses} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert references <= set(page.ids)


def test_the_page_parses_without_errors_as_browsers_do(written: tuple[Survey, Path]) -> None:
    html5lib = pytest.importorskip("html5lib", reason="a strict HTML parser, where there is one")
    parser = html5lib.HTMLParser(strict=True)
    parser.parse((written[1] / "report.html").read_text(encoding="utf-8"))


def test_page_and_markdown_hold_the_measured_numbers(written: tuple[Survey, Path]) -> None:
    found, directory = written
    for name in ("report.html", "report.md"):
        text = (directory / name).read_text(encoding="utf-8")
        for score in found.scores[1:]:
            assert scientific(score.kl) in text
            assert f"{score.perplexity:.2f}" in text
        for row in found.retrieval:
            assert f"{row.right * row.questions:.0f} of {row.questions}" in text
        for cost in found.costs:
            assert f"{cost.token:,}" in text
            assert f"{cost.sessions:,}" in text
        for row in found.speed:
            assert f"{row.decode:,.0f}" in text
        for finding in found.diagnosis.findings:
            assert finding.topic in text
        for corner in found.corners:
            assert f"{corner.cost.sessions:,}" in text
        assert "octavo report DIR --baseline pamphlet" in text
        assert found.fingerprint in text


def test_light_and_dark_share_figures_that_hold_no_colour_of_their_own(written: tuple[Survey, Path]) -> None:
    text = (written[1] / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert not any(role in text for role in svg.ROLES)
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))


def test_every_plot_of_the_markdown_is_a_file_of_its_own(written: tuple[Survey, Path]) -> None:
    _, directory = written
    plots = re.findall(r"!\[[^]]+\]\((plots/[\w-]+\.svg)\)", (directory / "report.md").read_text(encoding="utf-8"))
    assert len(plots) == 10
    for plot in plots:
        text = (directory / plot).read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert not any(role in text for role in svg.ROLES)


def test_the_numbers_are_one_json_document(written: tuple[Survey, Path]) -> None:
    found, directory = written
    document = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    assert document["scores"][1]["kl"] == found.scores[1].kl
    assert document["diagnosis"]["healthy"] is found.diagnosis.healthy
    assert document["calibration"]["samples"] == 2


def test_the_page_leads_with_kv8_and_counts_its_raw_pages(written: tuple[Survey, Path]) -> None:
    found, directory = written
    assert [cost.format for cost in found.costs] == ["fp32", "kv8", "k8v4", "kv4", "int8"]
    pages = 2 * 64 * found.costs[0].token
    assert found.costs[1].session == found.context * found.costs[1].token + pages
    ratio = found.costs[0].session / found.costs[1].session
    assert f"{ratio:.2f}×" in (directory / "report.html").read_text(encoding="utf-8")


def test_labels_of_lines_that_end_close_together_stand_above_one_another() -> None:
    kinds = (("bf16", "bf16", 15, 8), ("bf16", "int8", 15, 4), ("int4", "bf16", 5, 8), ("int4", "int8", 5, 4))
    costs = [
        Cost(w, a << 30, KVFormat.parse(kv), 0, b << 26, 0, ((24 - a) << 30) // (b << 26)) for w, kv, a, b in kinds
    ]
    figure = plots.growth(costs, 24 << 30)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert not any(box.padded(-1).overlaps(other) for other in boxes[:i])


def test_numbers_are_written_as_people_do() -> None:
    assert scientific(2.6e-4) == "2.6\u00a0×\u00a010<sup>−4</sup>"
    assert (scientific(0.0), scientific(float("nan"))) == ("0", "–")
    assert numbers("KL 6.9e-03, worst 1e-02.") == (
        "KL 6.9\u00a0×\u00a010<sup>−3</sup>, worst 1\u00a0×\u00a010<sup>−2</sup>."
    )
    assert prose("run `octavo calibrate <x>`, then --kv kv8") == (
        "run <code>octavo calibrate &lt;x&gt;</code>, then <code>--kv kv8</code>"
    )


def test_where_nothing_can_be_written_fails_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OctavoError, match=r"nothing can be written in .*--out"):
        require_directory(tmp_path / "file" / "x")


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OctavoError, match=re.escape(install("report"))):
        require_directory(tmp_path)
