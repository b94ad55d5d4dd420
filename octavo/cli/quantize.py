"""`octavo quantize`: write a model again with 4-bit weights, as an AWQ checkpoint."""

from pathlib import Path
from typing import Annotated

from octavo.cli.calibration_texts import CalibrationTexts
from octavo.cli.options import ChatTemplate, DeviceName, Dtype, ModelName, check_model, option, takes, tell_loading
from octavo.cli.progress import say, telling
from octavo.errors import Unsupported, require_new
from octavo.measure.budget import Windows, duration
from octavo.models.locate import BUNDLED, find_here, is_bundled, locate
from octavo.weights import GROUP_SIZES, validate

WANTED, LEAST = Windows(128, 512), Windows(16, 256)
ROUNDING = 0.7  # of the time, for scales and rounding; windows of text get the rest


@takes(CalibrationTexts)
def quantize(
    shown: CalibrationTexts,
    work_dir: Annotated[Path, option("A new directory for the 4-bit model.", show_default=False)],
    model: ModelName = None,
    bits: Annotated[int, option("Bits of a weight; 4 is the only choice.")] = 4,
    group_size: Annotated[
        int | None,
        option("Weights that share a scale and a zero: 32, 64 or 128. [default: the largest that fits the layers]"),
    ] = None,
    method: Annotated[
        str, option("awq: scaled and clipped by what the inputs are. rtn: rounded only, to compare with.")
    ] = "awq",
    dtype: Dtype = "auto",
    device: DeviceName = "auto",
    chat_template: ChatTemplate = None,
) -> None:
    """Write MODEL with 4-bit weights into --work-dir.

    The result is an AWQ checkpoint (gemm) of safetensors, which vLLM, LMDeploy and transformers read too:
    `octavo chat DIR --model-format awq`. Linear layers are quantized. Embeddings, the head, norms and experts keep
    their 16 bits, and so do layers that the groups do not divide. For the int8 KV cache calibrate the result,
    not MODEL: `octavo calibrate DIR`.
    """
    if bits != 4:
        raise Unsupported(f"weights are quantized to 4 bits only, not to {bits}")
    validate(group_size or GROUP_SIZES[0], method)
    check_model(model)
    require_new(work_dir, BUNDLED if is_bundled(model) else find_here(str(model)))
    time, texts = shown.time, shown.open()
    tell_loading(model)
    import torch

    from octavo import cores
    from octavo.cli.tables.quantize import show
    from octavo.models.load import load_model
    from octavo.models.model import Model
    from octavo.models.save import save_awq
    from octavo.quantize import SEARCHES, choose_group, choose_search
    from octavo.quantize import quantize as round_weights

    _, path = locate(model)
    require_16_bits(path)
    with torch.device("meta"):  # shapes by the config; no weight file is read
        group_size = choose_group(load_model(path, device="meta", load_format="dummy"), group_size)
    cores.use()
    loaded = Model.load(model, dtype=dtype, device=device, chat_template=chat_template, plain_weights=True)
    say(f"groups of {group_size} weights")
    room = time.part(ROUNDING).seconds
    search, seconds = choose_search(loaded.bound.hf, group_size, method, room)  # type: ignore[arg-type]  # validated
    cut = f": {search.steps} scales are tried, of {SEARCHES[0].steps}, to fit --budget {time}"
    say(f"searching and rounding: about {duration(seconds)}{cut if search != SEARCHES[0] else ''}")
    time = time.less(seconds)
    source, windows, _ = shown.draw(loaded, texts, WANTED, LEAST, time)
    with telling("watching inputs") as tell:
        quantized = round_weights(
            loaded.bound,
            windows,
            group_size=group_size,
            method=method,  # type: ignore[arg-type]  # validated above
            search=search,
            progress=tell,
        )
    template = loaded.tokenizer.chat_template if isinstance(loaded.tokenizer.chat_template, str) else None
    kept = save_awq(loaded.bound.hf, quantized.tensors, group_size, path, work_dir, chat_template=template)
    read = f"{len(windows)} windows of {len(windows[0])} tokens of {source}"
    show(quantized, read, kept, path, work_dir)


def require_16_bits(path: Path) -> None:
    """Raises Unsupported for a model whose weights are quantized already, or are no directory of their own."""
    from octavo.models.files import is_adapter, quantization
    from octavo.models.locate import is_gguf

    if is_gguf(path) or is_adapter(path):
        raise Unsupported(f"{path} is no Hugging Face directory with weights of its own: name one to quantize")
    found, _ = quantization(path)
    if found is not None:
        raise Unsupported(
            f"{path} holds weights that are quantized already ({found.get('quant_method', 'awq')}): "
            "name the 16-bit model"
        )
