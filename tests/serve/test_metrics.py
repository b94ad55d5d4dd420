"""`/cache` and `/metrics` count what sessions hold: blocks, and with edges raw pages, a shared one once."""

from __future__ import annotations

import httpx2 as httpx

from octavo import LLM
from octavo.models.model import Model
from octavo.quant.calibration import Calibration
from tests.conftest import wait_until
from tests.serve.conftest import serving


def test_sessions_of_one_beginning_hold_a_ring_each_and_one_first_page(
    pamphlet: Model, calibration: Calibration, text_ids: list[int]
) -> None:
    llm = LLM(pamphlet, "kv8", calibration=calibration, session_len=512, max_batch_size=4)
    with serving(llm) as running:
        ask = running.client().completions.create

        def state() -> dict[str, int]:
            return httpx.get(f"{running.url}/cache").json()

        common = text_ids[:64]
        ask(model="pamphlet", prompt=[*common, 1], max_tokens=1)  # leaves the first page in the cache
        wait_until(lambda: state()["sessions_running"] == 0)
        before = state()
        assert (before["raw_pages_used"], before["raw_pages_cached"], before["bytes_used"]) == (0, 1, 0)
        assert before["bytes_cached"] == before["block_bytes"] + before["raw_page_bytes"]

        on = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
        streams = [ask(model="pamphlet", prompt=[*common, i], **on) for i in (2, 3)]
        wait_until(lambda: state()["sessions_running"] == 2)
        held = state()
        assert held["raw_pages_used"] == 2 + 1
        assert held["bytes_used"] == held["blocks_used"] * held["block_bytes"] + 3 * held["raw_page_bytes"]
        assert held["raw_pages_total"] == 4 * held["raw_pages_per_session"] + 4
        assert held["bytes_allocated"] == llm.cache.nbytes
        assert "octavo_raw_pages_used 3.0" in httpx.get(f"{running.url}/metrics").text
        for stream in streams:
            stream.close()
        running.assert_idle()
        assert state()["raw_pages_used"] == 0
