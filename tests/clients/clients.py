"""Real clients of the server: what is installed of each, and the typical program that is run with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
PACKAGES = HERE / "package.json", HERE / "package-lock.json"
SECONDS = 1800  # that one program may take
QUIET = {
    "OPENAI_API_KEY": "none",
    "ANTHROPIC_API_KEY": "none",
    "HAYSTACK_TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


class Missing(Exception):
    """What a client needs is not on this machine."""


@dataclass(frozen=True)
class Client:
    """A client in an environment of its own: clients want different releases of the same libraries."""

    package: str  # whose release is told
    program: str
    pin: str  # all that is asked of the registry

    @property
    def release(self) -> str:
        return self.pin.rpartition("==")[2]

    @property
    def what(self) -> str:
        """What its program runs, by the program's first line."""
        first = (PROGRAMS / self.program).read_text(encoding="utf-8").splitlines()[0]
        return first.strip('/" .').partition(": ")[2]

    def install(self, home: Path) -> None:
        """Make its environment below `home`, unless it is there. Raises CalledProcessError where the registry does not
        have it."""
        mark, own = home / self.package / "pinned", home / self.package
        if mark.exists() and mark.read_text() == self.pin:
            return
        print(f"installing {self.package} {self.release}", flush=True)
        shutil.rmtree(own, ignore_errors=True)
        self._install(own)
        mark.write_text(self.pin)

    def _install(self, own: Path) -> None:
        venv.create(own, with_pip=True)
        pip = [own / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, self.pin], check=True)

    def command(self, own: Path) -> list[str]:
        return [str(own / "bin/python"), str(PROGRAMS / self.program)]

    def run(self, home: Path, url: str, model: str) -> str:
        """What goes wrong when its program is run against a server; nothing if all is well."""
        return run(self.command(home / self.package), url, model)


class JavaScript(Client):
    """A client from npm, and the node that it is pinned with."""

    def _install(self, own: Path) -> None:
        if not shutil.which("npm"):
            raise Missing("npm is not installed")
        own.mkdir(parents=True)
        for file in PACKAGES:
            shutil.copy(file, own)
        subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=own, check=True)

    def command(self, own: Path) -> list[str]:
        program = own / self.program  # modules are looked for from the program's own folder on
        shutil.copy(PROGRAMS / self.program, program)
        return [str(own / "node_modules/.bin/node"), str(program)]


def run(command: list[str], url: str, model: str) -> str:
    done = subprocess.run(
        [*command, url, model], env=os.environ | QUIET, capture_output=True, text=True, timeout=SECONDS
    )
    return "" if done.returncode == 0 else done.stderr[-4000:] or f"status {done.returncode}"


def _npm(package: str) -> str:
    return f"{package}=={json.loads(PACKAGES[0].read_text())['dependencies'][package]}"


def _pypi(package: str, program: str) -> Client:
    lines = (HERE / "requirements.txt").read_text().splitlines()
    (pin,) = (line for line in lines if line.partition("==")[0].partition("[")[0] == package)
    return Client(package, program, pin)


CLIENTS: tuple[Client, ...] = (
    _pypi("openai", "openai_sdk.py"),
    _pypi("openai-agents", "openai_agents.py"),
    _pypi("anthropic", "anthropic_sdk.py"),
    _pypi("langchain-openai", "langchain_openai_sdk.py"),
    _pypi("pydantic-ai-slim", "pydantic_ai_sdk.py"),
    _pypi("instructor", "instructor_sdk.py"),
    _pypi("litellm", "litellm_sdk.py"),
    _pypi("llama-index-llms-openai-like", "llama_index_sdk.py"),
    _pypi("haystack-ai", "haystack_sdk.py"),
    _pypi("llm", "llm_cli.py"),
    JavaScript("ai", "vercel_ai.mjs", _npm("ai")),
)
