"""Exported scales, read by the other projects' own code.

    python scripts/foreign_readers.py --wheels DIR      # wheels are kept there; some 700 MB the first time

Their packages need GPUs, other versions of torch, or gigabytes: none is installed. Each wheel is fetched by pip without
its dependencies, and of it the functions that read scales are run by themselves, as they stand in their files. What is
checked is the bundled model's calibration: every reader must find the numbers that were written. compressed-tensors
installs everywhere and is checked by tests/scales.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import typing
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import torch
from safetensors.torch import load_file

from octavo.calibrate import calibrate
from octavo.models.model import BUNDLED, Model
from octavo.quant.calibration import Calibration
from octavo.scales import export_scales, import_scales
from octavo.scales.checkpoint import SCALES

WHEELS = {
    "sglang": "0.5.23", "vllm": "0.33.0", "nvidia-modelopt": "0.47.0", "onnxruntime-genai": "0.18.0",
    "lmdeploy": "0.4.2",
}  # fmt: skip


def source(wheels: Path, project: str, file: str) -> str:
    """A file of a project's wheel, which is fetched if it is not there."""
    stem = f"{project.replace('-', '_')}-{WHEELS[project]}"
    if not list(wheels.glob(f"{stem}-*.whl")):
        wanted = f"{project}=={WHEELS[project]}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), wanted]
        subprocess.run(command, check=True)
    (wheel,) = wheels.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(file).decode()


def parts(text: str, names: Iterable[str], known: dict[str, Any]) -> SimpleNamespace:
    """The functions, classes and constants of these names, run by themselves; `known` is what they use of others."""
    wanted, found = set(names), []
    for node in ast.walk(ast.parse(text)):
        own = getattr(node, "name", None)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            own = next((target.id for target in targets if isinstance(target, ast.Name)), None)
        if own in wanted:
            wanted.discard(own)
            found.append(node)
    assert not wanted, f"not in this version: {wanted}"
    code = compile(ast.Module(found, []), "<reader>", "exec", dont_inherit=True)  # its annotations are values
    exec(code, known)  # from a wheel of the package index, of a version named above
    return SimpleNamespace(**known)


def sglang(wheels: Path, folder: Path, model: Model, calibration: Calibration) -> None:
    """`kv_cache_scales_loader`, with the schemas that check the file."""
    export_scales(folder / "sglang.json", "sglang", model, calibration)
    text = source(wheels, "sglang", "sglang/srt/model_loader/weight_utils.py")
    known = vars(typing) | {"json": json, "logger": logging.getLogger("sglang")}
    known |= {
        name: getattr(pydantic, name) for name in ("BaseModel", "ConfigDict", "ValidationInfo", "model_validator")
    }
    reader = parts(text, ["KVCacheQuantSchema", "QuantParamSchema", "kv_cache_scales_loader"], known)
    layers = len(model.bound.shapes)
    read = dict(reader.kv_cache_scales_loader(str(folder / "sglang.json"), 0, 1, layers, "llama"))
    written = json.loads((folder / "sglang.json").read_text())["kv_cache"]["scaling_factor"]["0"]
    assert read == {int(layer): scale for layer, scale in written.items()}
    assert len(read) == layers


def vllm(wheels: Path, folder: Path, model: Model, calibration: Calibration) -> None:
    """`maybe_remap_kv_scale_name` finds the attention layer of every tensor."""
    text = source(wheels, "vllm", "vllm/model_executor/model_loader/weight_utils.py")
    sys.modules.setdefault("regex", re)
    reader = parts(text, ["maybe_remap_kv_scale_name"], {"logger": logging.getLogger("vllm")})
    params = {f"model.layers.{i}.self_attn.attn.{side}_scale": None for i in range(len(model.bound.shapes))
              for side in "kv"}  # fmt: skip
    for name in ("vllm", "modelopt"):
        export_scales(folder / name, name, model, calibration)
        tensors = load_file(folder / name / SCALES)
        assert {reader.maybe_remap_kv_scale_name(tensor, params) for tensor in tensors} == set(params)


def modelopt(wheels: Path, folder: Path, model: Model, calibration: Calibration) -> None:
    """Its own export, `postprocess_state_dict`, makes the same tensors of the same largest values."""
    text = source(wheels, "nvidia-modelopt", "modelopt/torch/export/quant_utils.py")
    names = ["_KV_CACHE_REPLACEMENTS", "_BASE_SKIP_KEYS", "_strip_base_layer", "_maybe_squeeze_scale"]
    known = {
        "torch": torch, "logger": logging.getLogger("modelopt"), "Any": Any, "KV_CACHE_FP8": "FP8",
        "KV_CACHE_NVFP4": "NVFP4", "KV_CACHE_NVFP4_AFFINE": "NVFP4_AFFINE",
        "RealQuantLinear": SimpleNamespace(list_of_scale_tensors=[]),
    }  # fmt: skip
    writer = parts(text, [*names, "postprocess_state_dict"], known)
    state = {
        f"model.layers.{i}.self_attn.{side}_bmm_quantizer._amax": torch.maximum(
            sides[side]["min"].abs(), sides[side]["max"].abs()
        ).amax()
        for i, sides in enumerate(calibration.layers)
        for side in ("k", "v")
    }
    theirs = writer.postprocess_state_dict(state, 448.0, "FP8")
    export_scales(folder / "by modelopt", "modelopt", model, calibration)
    ours = load_file(folder / "by modelopt" / SCALES)
    assert theirs.keys() == ours.keys()
    for name, scale in theirs.items():
        torch.testing.assert_close(ours[name], scale, rtol=1e-6, atol=0)


def onnxruntime_genai(wheels: Path, folder: Path, model: Model, calibration: Calibration) -> None:
    """The model builder checks the file, and puts our scales into the graph."""
    folder_of = "onnxruntime_genai/models"
    config = source(wheels, "onnxruntime-genai", f"{folder_of}/quantization/quant_config.py")
    known = vars(parts(config, ["KV_CACHE_CALIBRATION_QMAX"], {})) | {"np": np, "json": json, "os": os}
    text = source(wheels, "onnxruntime-genai", f"{folder_of}/builders/base.py")
    reader = parts(text, ["get_kv_cache_calibration_factor", "make_kv_cache_scale_initializers"], known)
    file, shapes, made = folder / "onnxruntime.json", model.bound.shapes, {}
    export_scales(file, "onnxruntime-genai", model, calibration)
    builder = SimpleNamespace(
        kv_cache_attrs={"quant_mode": "PER_CHANNEL", "quant_scheme": "int8_per_channel", "scales_path": str(file)},
        num_kv_heads=shapes[0].kv_heads,
        head_size=shapes[0].k_dim,
        num_layers=len(shapes),
        input_names={"past_key_values.key": dict.fromkeys(range(len(shapes)))},
        use_paged_attention=False,
        get_kv_cache_scale_names=lambda layer: ((layer, "k"), (layer, "v")),
        make_initializer=lambda scale, name: made.update({name: scale}),
    )
    builder.get_kv_cache_calibration_factor = partial(reader.get_kv_cache_calibration_factor, builder)
    reader.make_kv_cache_scale_initializers(builder)
    written = json.loads(file.read_text())["scales"]
    for layer in range(len(shapes)):
        for side in "kv":
            np.testing.assert_array_equal(made[layer, side], np.float32(written[f"{side}_scales"][layer]))


def lmdeploy(wheels: Path, folder: Path, model: Model, calibration: Calibration) -> None:
    """`lmdeploy lite kv_qparams` makes of our statistics the files that we write for TurboMind."""
    text = source(wheels, "lmdeploy", "lmdeploy/lite/apis/kv_qparams.py")
    program: dict[str, Any] = {"__name__": "kv_qparams"}
    exec(compile(text, "kv_qparams.py", "exec"), program)
    stats, theirs, ours = folder / "stats", folder / "theirs", folder / "ours"
    theirs.mkdir()
    export_scales(stats, "lmdeploy", model, calibration)
    program["main"](str(stats), str(theirs))
    export_scales(ours, "turbomind", model, import_scales(stats, "lmdeploy", model))
    files = sorted(file.name for file in theirs.iterdir())
    assert files == sorted(file.name for file in ours.iterdir())
    for file in files:
        one, other = (np.fromfile(where / file, dtype=np.float32) for where in (theirs, ours))
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)  # theirs are computed in float16


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--wheels", type=Path, required=True)
    wheels = cli.parse_args().wheels
    wheels.mkdir(exist_ok=True)
    model = Model.load(BUNDLED, dtype="float32")
    ids = model.tokenizer((BUNDLED / "evaluation.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    calibration = calibrate(model, [ids[:256], ids[256:512]], dataset="the bundled text")
    for check in (sglang, vllm, modelopt, onnxruntime_genai, lmdeploy):
        with tempfile.TemporaryDirectory() as folder:
            check(wheels, Path(folder), model, calibration)
        name = check.__name__.replace("_", "-")
        version = WHEELS.get(name) or WHEELS[f"nvidia-{name}"]
        print(f"{name} {version}: {next(iter((check.__doc__ or '').splitlines()))}")


if __name__ == "__main__":
    main()
