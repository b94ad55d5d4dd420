"""The tests that need a GPU, the Triton kernels' own among them, compiled and not interpreted. A row as each ends."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest
from rows import emit

ROOT = Path(__file__).parent.parent.parent


class Rows:
    """Hears pytest's reports. A test has one of its setup, one of its call if it came to that, one of its teardown."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            message = "" if report.passed else str(report.longrepr)[-1000:]
            emit({"measure": "test", "test": report.nodeid, "outcome": report.outcome, "message": message})


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--dry-run", action="store_true")
    cli.parse_args()
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)  # not this folder, in which `tests` is this file
    sys.exit(pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "tests/attention", "tests/engine"], [Rows()]))


if __name__ == "__main__":
    main()
