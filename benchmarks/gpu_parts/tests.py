"""The tests that need a GPU, the Triton kernels' own among them, compiled and not interpreted."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from rows import emit

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--dry-run", action="store_true")
    args = cli.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", f"--junitxml={report}",
                   "tests/attention", "tests/engine"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(done.stdout[-6000:])
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        failed = [
            {"test": f"{case.get('classname')}.{case.get('name')}", "message": (bad.get("message") or "")[:300]}
            for case in suite.iter("testcase")
            for bad in [*case.findall("failure"), *case.findall("error")]
        ]
    emit({"measure": "tests", **counts, "failed": failed, "dry_run": args.dry_run})


if __name__ == "__main__":
    main()
