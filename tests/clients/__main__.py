"""Real clients against `octavo serve`, in one command (`make test-clients`):

    python -m tests.clients [--model MODEL] [--home DIR] [CLIENT …]

Installs what of the pinned clients is not installed below DIR, starts the server, runs every client's program and what
promises.py asks, and prints the table of docs/SERVE.md. The status is 1 if something fails.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.clients import promises
from tests.clients.clients import CLIENTS, Missing
from tests.serve.conftest import TOOLED

STOPPED = 60  # seconds that the server has to end


def bundled(home: Path) -> list[str]:
    """The bundled model, with a chat template that takes tools."""
    template = home / "template.jinja"
    template.write_text(TOOLED, encoding="utf-8")
    return ["--chat-template", str(template)]


@contextmanager
def server(model: list[str], log: Path) -> Iterator[dict[str, str]]:
    """`octavo serve` in a process; what it says of itself."""
    command = [sys.executable, "-m", "octavo", "serve", *model, "--port", "0", "--session-len", "2048", "--json"]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        try:
            yield json.loads(line)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOPPED)


def faults(log: Path) -> list[str]:
    """Lines of the server's log that should not be there."""
    bad = (" ERROR ", " 500 id=", "leaked function")
    return [line for line in log.read_text(encoding="utf-8").splitlines() if any(sign in line for sign in bad)]


def main() -> int:
    names = [client.package for client in CLIENTS]
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", help="what is served; by default the bundled model")
    cli.add_argument("--home", type=Path, default=Path(".clients"), metavar="DIR", help="where they are installed")
    cli.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(names))
    args = cli.parse_args()
    if unknown := set(args.clients) - set(names):
        cli.error(f"there is no client {unknown.pop()}: choose of {', '.join(names)}")
    args.home.mkdir(parents=True, exist_ok=True)
    missing, failed = dict[str, str](), 0
    chosen = [client for client in CLIENTS if not args.clients or client.package in args.clients]
    for client in chosen:
        try:
            client.install(args.home)
        except Missing as error:
            missing[client.package] = str(error)
    log = args.home / "server.log"
    with server([args.model] if args.model else bundled(args.home), log) as state:
        print("| client | release | what was run | result |\n|---|---|---|---|")
        for client in chosen:
            result, wrong = f"not run: {missing.get(client.package)}", ""
            if client.package not in missing:
                wrong = client.run(args.home, state["url"], state["model"])
                result = "fails" if wrong else "works"
            failed += bool(wrong)
            print(f"| {client.package} | {client.release} | {client.what} | {result} |", flush=True)
            if wrong:
                print(wrong, file=sys.stderr, flush=True)
        failed += promises.main(state["url"])
    for line in (found := faults(log)):
        print(f"the server's log: {line}", file=sys.stderr)
    return 1 if failed or found else 0


if __name__ == "__main__":
    sys.exit(main())
