"""lm-evaluation-harness's own command line with `--model octavo`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra octavo[tasks] is not installed")

TASK = """
task: boats
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def reads_entry_points() -> bool:
    """Whether this harness is later than 0.4.13."""
    from lm_eval.api import registry

    return hasattr(registry, "import_plugins")


def test_the_entry_point_names_the_model():
    """What harnesses later than 0.4.13 go by."""
    from octavo.measure.tasks.harness import OctavoLM

    (found,) = entry_points(group="lm_eval.models", name="octavo")
    assert found.load() is OctavoLM


@pytest.mark.slow
def test_the_command_scores_a_task(tmp_path: Path):
    """From the command line to the results file, in 4 bits; the harness needs no network for a task of one's own. The
    command is its own, `lm_eval`, where that finds our entry point."""
    data = tmp_path / "boats.json"
    documents = [{"question": "The boat went down the", "choices": [" river", " lamp"], "answer": 0}] * 4
    data.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "boats.yaml").write_text(TASK.format(data=data))
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval" if reads_entry_points() else "octavo.measure.tasks.lm_eval",
            "--model", "octavo",
            "--model_args", "pretrained=pamphlet,kv=kv4,dtype=float32", "--tasks", "boats",
            "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["boats"]["acc,none"] == 1.0
