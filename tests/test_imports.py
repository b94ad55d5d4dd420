"""The architecture, as the import statements tell it: each part of the package knows only those below it.

Imports count wherever they stand: at the top, within a function, or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "octavo"

# From the ground up. A part imports from earlier groups and from itself; parts of one group know nothing of each other.
ORDER = (
    ("contexts", "cores", "errors", "interrupts", "progress"),
    ("artefact", "devices", "native", "units"),
    ("quant",),
    ("cache",),
    ("attention",),
    ("recurrences", "weights"),
    ("processor",),
    ("models",),
    ("engine", "parallel", "scales"),
    ("text",),
    ("token_bytes",),
    ("grammars",),
    ("completion", "inputs"),
    ("calibrate",),
    ("attachment", "llm"),
    ("llm_plugin", "plain_sessions"),
    ("corpus", "text_windows"),
    ("quantize",),
    ("serve",),
    ("measure",),
    ("jsonl",),
    ("ray",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, group in enumerate(ORDER) for part in group}
# What the package itself offers by name, and the part that it comes from.
OFFERED = {
    "attach": "attachment",
    "LLM": "llm",
    "SamplingParams": "engine",
    "KVFormat": "quant",
    "OctavoError": "errors",
    "Unsupported": "errors",
    "__version__": "errors",
}
VAGUE = {"util", "utils", "common", "base", "helper", "helpers", "misc", "manager", "managers", "handler", "handlers"}
LONGEST = 400  # lines

FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def imports(file: Path) -> list[str]:
    """Full names of the modules and names that a file imports, or reads of the package, wherever in the file."""
    package, found = file.relative_to(ROOT).parent.parts, list[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):  # the bare package only tells what is then read of it
            found += [alias.name for alias in node.names if alias.name != PACKAGE.name]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE.name:
            found.append(f"{PACKAGE.name}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def part_of(name: str) -> str | None:
    """The part of the package that a full name belongs to; None if it is another's."""
    first, *rest = name.split(".")
    if first != PACKAGE.name:
        return None
    return OFFERED.get(rest[0], rest[0])


def test_the_package_has_just_the_parts_whose_order_is_known():
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert parts - {"__init__"} <= LEVEL.keys()
    assert {"quant", "cache", "attention", "models", "engine", "text", "llm", "cli"} <= parts


def test_files_import_only_from_the_parts_below_their_own():
    for file in FILES:
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":  # it offers names of every part, and imports them when they are asked for
            continue
        for name in imports(file):
            part = part_of(name)
            if part is not None and part != own:
                assert part in LEVEL, f"{file}: {name} is not a part of the package"
                assert LEVEL[part] < LEVEL[own], f"{file}: {own} must not know {name}"


def test_an_import_in_the_wrong_direction_would_be_found():
    """The test above is only as good as its reading of imports."""
    assert part_of("octavo.engine.engine.Engine") == "engine"
    assert part_of("octavo.LLM") == "llm"
    assert part_of("octavo.errors.OctavoError") == "errors"
    assert part_of("torch.nn") is None
    assert LEVEL["quant"] < LEVEL["engine"] < LEVEL["cli"]
    assert LEVEL["text_windows"] == LEVEL["corpus"]
    found = set(imports(PACKAGE / "cli" / "loading.py"))
    assert "octavo.llm.LLM" in found, "an import under TYPE_CHECKING counts"
    assert "octavo.llm.LLM" in set(imports(PACKAGE / "__init__.py")), "an import within a function counts"


def test_what_a_file_reads_of_the_bare_package_counts_as_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "octavo").mkdir()
    file = tmp_path / "octavo" / "quick.py"
    file.write_text(
        "import octavo\nfrom . import cli\nfrom .engine import engine\nprint(octavo.__version__, octavo.LLM)\n"
    )
    assert sorted(imports(file)) == ["octavo.LLM", "octavo.__version__", "octavo.cli", "octavo.engine.engine"]


@pytest.mark.parametrize(
    "module", ["quant/format.py", "cache/blocks.py", "engine/params.py", "engine/values.py", "errors.py"]
)
def test_modules_of_plain_data_import_no_tensors(module: str):
    outside = {name.split(".")[0] for name in imports(PACKAGE / module)} - {PACKAGE.name}
    assert outside <= set(sys.stdlib_module_names), f"{module} imports {outside}"
    for name in imports(PACKAGE / module):
        assert part_of(name) in (None, "errors") or name.startswith("octavo.engine.values."), f"{module} imports {name}"


def test_modules_of_plain_data_load_neither_torch_nor_transformers():
    modules = "octavo, octavo.errors, octavo.quant.format, octavo.cache.blocks, octavo.engine.params"
    code = f"import sys, {modules}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_longer_than_one_reads_in_a_sitting():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {file: count for file, count in lines.items() if count > LONGEST}


def test_no_module_has_a_name_that_says_nothing():
    names = {part.removesuffix(".py").strip("_").lower() for file in FILES for part in file.relative_to(PACKAGE).parts}
    assert not names & VAGUE


def test_no_module_knows_itself_by_way_of_others():
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    del modules[PACKAGE.name]  # it offers names of every part

    def known(file: Path) -> set[str]:
        found = {name if name in modules else name.rpartition(".")[0] for name in imports(file)}
        return found & modules.keys()

    graph = {name: known(file) - {name} for name, file in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle
