"""lm-evaluation-harness's own command line, with `--model octavo` known to it.

    python -m octavo.measure.tasks.lm_eval run --model octavo --model_args pretrained=DIR,kv=int8 --tasks hellaswag

Harnesses later than 0.4.13 find Octavo by its entry point and need no help.
"""

from lm_eval.__main__ import cli_evaluate

import octavo.measure.tasks.harness  # noqa: F401 - registers the model

if __name__ == "__main__":
    cli_evaluate()
