"""Run clients' programs against a server that runs: `python tests/clients/running.py URL MODEL DIR` prints the table
of docs/SERVE.md. DIR is where environments.py has made their environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"


@dataclass(frozen=True)
class Client:
    environment: str
    program: str
    package: str  # whose release is told

    @property
    def told(self) -> str:
        """What its program runs, by the program's first line."""
        first = (PROGRAMS / self.program).read_text(encoding="utf-8").splitlines()[0]
        return first.strip('/" .').partition(": ")[2]

    def release(self) -> str:
        """The pinned one."""
        if self.program.endswith(".mjs"):
            return json.loads((HERE / "package.json").read_text())["dependencies"][self.package]
        lines = (HERE / f"{self.environment}.txt").read_text().splitlines()
        return next(
            line.partition("==")[2] for line in lines if line.partition("==")[0].partition("[")[0] == self.package
        )

    def command(self, environments: Path) -> list[str]:
        home = environments / self.environment
        if self.program.endswith(".mjs"):  # modules are looked for from the program's own folder on
            program = home / self.program
            program.write_text((PROGRAMS / self.program).read_text(encoding="utf-8"), encoding="utf-8")
            return [str(home / "node_modules/.bin/node"), str(program)]
        return [str(home / "bin/python"), str(PROGRAMS / self.program)]


CLIENTS = (
    Client("openai", "openai_sdk.py", "openai"),
    Client("openai-agents", "openai_agents.py", "openai-agents"),
    Client("anthropic", "anthropic_sdk.py", "anthropic"),
    Client("langchain", "langchain_openai_sdk.py", "langchain-openai"),
    Client("pydantic-ai", "pydantic_ai_sdk.py", "pydantic-ai-slim"),
    Client("instructor", "instructor_sdk.py", "instructor"),
    Client("litellm", "litellm_sdk.py", "litellm"),
    Client("llama-index", "llama_index_sdk.py", "llama-index-llms-openai-like"),
    Client("haystack", "haystack_sdk.py", "haystack-ai"),
    Client("llm", "llm_cli.py", "llm"),
    Client("vercel-ai", "vercel_ai.mjs", "ai"),
)


def run(command: list[str], url: str, model: str) -> str:
    """What goes wrong; nothing if all is well."""
    keys = {"OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none", "HAYSTACK_TELEMETRY_ENABLED": "false"}
    environment = {**os.environ, **keys, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run([*command, url, model], env=environment, capture_output=True, text=True, timeout=1800)
    return "" if done.returncode == 0 else done.stderr[-4000:] or f"status {done.returncode}"


if __name__ == "__main__":
    url, model, root = sys.argv[1:4]
    print("| client | release | what was run | result |\n|---|---|---|---|")
    for client in CLIENTS:
        if sys.argv[4:] and client.environment not in sys.argv[4:]:
            continue
        wrong = run(client.command(Path(root)), url, model)
        print(
            f"| {client.package} | {client.release()} | {client.told} | {'fails' if wrong else 'works'} |",
            flush=True,
        )
        print(wrong, file=sys.stderr, flush=True)
