"""The page at /, driven in headless Chromium as a reader would: type, see the answer grow, stop it, reload."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octavo import LLM
from octavo.models.model import Model
from tests.serve.conftest import Running, serving, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

HOSTILE = "<img src=x onerror=\"document.title='harmed'\"> <b>bold</b>\n```html\n<script>1</script>\n```\n`a<b`"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def running(pamphlet: Model) -> Iterator[Running]:
    with serving(LLM(pamphlet, kv="int8-token", session_len=1024, max_batch_size=4)) as running:
        yield running


@contextmanager
def opened(browser: Any, running: Running, **options: Any) -> Iterator[Any]:
    """The page in a new window; nothing in it may fail or be forbidden by its own policy."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(running.url)
    try:
        yield page
        assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
    finally:
        context.close()
        running.assert_idle()


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def shorten(page: Any, max_tokens: int) -> None:
    """Answers of at most so many tokens."""

    def send(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "max_tokens": max_tokens}))

    page.route("**/v1/chat/completions", send)


def done(page: Any) -> None:
    page.wait_for_selector("#send:visible", timeout=60_000)


def number(page: Any, id: str) -> int:
    text = page.text_content(f"#{id}").replace(",", "")
    return int(re.match(r"\d+", text)[0]) if text[0].isdigit() else 0  # type: ignore[index]


def test_an_answer_grows_and_is_stopped_and_is_there_after_a_reload(browser: Any, running: Running):
    with opened(browser, running) as page:
        assert page.is_visible("#empty")
        wait_until(lambda: number(page, "free") == 64)
        assert page.locator("#sheet rect.used, #sheet rect.kept").count() == 0
        ask(page, "Tell me a story")
        page.wait_for_selector(".turn.assistant p")
        first = page.inner_text(".turn.assistant .text")
        wait_until(lambda: len(page.inner_text(".turn.assistant .text")) > len(first) + 20)
        wait_until(lambda: number(page, "used") >= 1 and number(page, "sessions") == 1)
        page.keyboard.press("Escape")
        done(page)
        running.assert_idle()
        text = page.inner_text(".turn.assistant .text")
        assert page.inner_text(".turn.assistant footer") == "stopped"
        assert text.startswith(first.strip())
        assert len(text) > len(first)
        assert page.evaluate("document.activeElement.id") == "message"
        assert page.locator(".turn h3").all_inner_texts() == ["YOU", "PAMPHLET"]

        page.reload()
        assert page.locator(".turn .text").all_inner_texts() == ["Tell me a story", text]
        ask(page, "Go on")
        page.wait_for_selector("#stop:visible")
        page.click("#stop")
        done(page)
        page.click("#new")
        assert page.is_visible("#empty")
        page.reload()
        assert page.locator(".turn").count() == 0


def test_the_gauge_moves_and_a_second_question_finds_the_first_in_the_cache(browser: Any, running: Running):
    with opened(browser, running) as page:
        shorten(page, 16)
        ask(page, "Tell me a story about a cat. " * 12)
        done(page)
        ask(page, "And then?")
        page.wait_for_selector("#stop:visible")
        done(page)
        assert re.search(r"\d+ of \d+ prompt tokens were in the cache", page.inner_text(".turn:last-child footer"))
        wait_until(lambda: page.locator("#sheet rect.kept").count() >= 2)
        wait_until(lambda: number(page, "hits") >= 64)
        assert number(page, "used") + number(page, "kept") + number(page, "free") == 64
        assert page.inner_text("#ratio") == "1.97× smaller"
        assert re.fullmatch(r"\d+ tokens, [\d.]+ [KM]iB", page.inner_text("#here"))


def test_text_is_text_whoever_wrote_it(browser: Any, running: Running):
    with opened(browser, running) as page:
        page.press("#message", "Shift+Enter")
        assert page.input_value("#message") == "\n"
        ask(page, HOSTILE)
        page.wait_for_selector(".turn.assistant")
        page.keyboard.press("Escape")
        done(page)
        shown = page.locator(".turn.user .text")
        if shown.count() == 0:  # stopped before the answer began: the message is back in its field
            assert page.input_value("#message") == HOSTILE
            ask(page, HOSTILE)
            page.wait_for_selector(".turn.assistant p")
            page.keyboard.press("Escape")
            done(page)
        assert shown.locator("img, b, script").count() == 0
        assert "<img src=x" in shown.inner_text()
        assert shown.locator("pre code").inner_text() == "<script>1</script>"
        assert shown.locator("p code").inner_text() == "a<b"
        assert "harmed" not in page.title()
        policy = page.request.get(running.url).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_a_refused_message_is_not_lost(browser: Any, running: Running):
    with opened(browser, running) as page:
        long = "word " * 2000
        page.fill("#message", long)
        page.press("#message", "Enter")
        wait_until(lambda: "session holds 1024" in page.inner_text("#complaint"))
        assert page.input_value("#message") == long.strip()
        assert page.locator(".turn").count() == 0


def test_a_server_with_a_key_is_asked_for_it_on_a_phone(browser: Any, pamphlet: Model):
    llm = LLM(pamphlet, kv="int8-token", session_len=256, max_batch_size=2)
    phone = {"viewport": {"width": 390, "height": 844}}
    with serving(llm, api_key="secret") as running, opened(browser, running, **phone) as page:
        assert not page.is_visible("#sheet"), "the panel is folded"
        ask(page, "Tell me a story")
        wait_until(lambda: "asks for a key" in page.inner_text("#complaint"))
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("secret")
        assert page.input_value("#message") == "Tell me a story"
        page.press("#message", "Enter")
        page.wait_for_selector(".turn.assistant p")
        page.keyboard.press("Escape")
        done(page)
        wait_until(lambda: number(page, "free") > 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
