"""llm with its plug-in for OpenAI's API: a prompt, its stream, a conversation, a schema, a tool."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, name = sys.argv[1:]
home = tempfile.TemporaryDirectory()
Path(home.name, "extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: {name}\n  api_base: {url}/v1\n  supports_schema: true\n  supports_tools: true\n"
)


def llm(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "LLM_USER_PATH": home.name}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


short = ("-o", "max_tokens", "16", "-o", "temperature", "0")
said = llm("-m", "here", "How is the weather?", "--no-stream", *short)
assert llm("-m", "here", "How is the weather?", *short) == said
assert llm("-m", "here", "-c", "And tomorrow?", *short)
found = json.loads(llm("-m", "here", "How is the sky?", "--schema", "clear bool", "-o", "max_tokens", "100"))
assert found["clear"] in (True, False)
llm("-m", "here", "What is the time?", "-T", "llm_time", *short)
