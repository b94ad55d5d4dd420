"""From a model as the user wrote it to its directory, without torch: what is named wrongly is said at once."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.errors import OctavoError

ADAPTER = "adapter_config.json"  # of a LoRA adapter
BUNDLED = Path(__file__).parent.parent / "data" / "pamphlet"
PROSE = BUNDLED / "evaluation.txt"  # English, written for this project
HUB_SECONDS = 5.0  # that the Hub has for saying whether it knows a model
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def locate(model: str | Path | None) -> tuple[str, Path]:
    """Name and directory of a model as the user wrote it: a directory, a Hub id, or the bundled model if None."""
    if model is not None and not isinstance(model, str | Path):
        kind = type(model).__name__
        told = f"A {kind} is no name of a model: give its directory or a Hub id; octavo.attach takes a {kind}."
        raise OctavoError(told)
    name = str(model if model is not None else BUNDLED.name)
    return name, BUNDLED if is_bundled(model) else resolve(name)


def is_bundled(model: str | Path | None) -> bool:
    # A folder of that name may hold a calibration only: `--work-dir pamphlet`.
    name = str(model)
    return model is None or (name == BUNDLED.name and not (Path(name) / "config.json").is_file())


def resolve(model: str | Path) -> Path:
    """The directory of a model: itself where it holds a config.json or a LoRA adapter, else a Hub id's snapshot,
    fetched if need be; or a GGUF file."""
    return find_here(model) or _download(str(model))


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def find_here(model: str | Path) -> Path | None:
    """The directory of a model that is here, or None for what can only be a Hub id; OctavoError for what is neither.

    A directory without config.json may still be a Hub id: `--work-dir internlm/internlm-chat-7b` makes one that holds
    a calibration only.
    """
    path = Path(model).expanduser()
    try:
        if (path / "config.json").is_file() or (path / ADAPTER).is_file() or is_gguf(path):
            return path
    except OSError as error:  # a prompt where the model belongs may be longer than a name can be
        why = f"{str(model)[:60]} … ({error.strerror})"
        raise OctavoError(f"{why}: name a directory that holds a Hugging Face model.") from None
    if path.is_file():
        raise OctavoError(f"{model} is a file: name the directory that holds config.json and the weights, or a .gguf.")
    if not _HUB_ID.fullmatch(str(model)):
        if path.is_dir():
            raise OctavoError(f"The directory {model} has no config.json: name one that holds a Hugging Face model.")
        raise OctavoError(f"There is no directory {model}: name one that holds a Hugging Face model, or a Hub id.")
    return None


def _download(repo: str) -> Path:
    """A Hub snapshot without code and without a second copy of the weights."""
    import huggingface_hub

    # Subfolders and consolidated files hold the weights again, in other formats.
    doubles = ["*/*", "consolidated*"]
    files = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    with _hub_errors(repo):
        path = Path(huggingface_hub.snapshot_download(repo, allow_patterns=files, ignore_patterns=doubles))
        if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            huggingface_hub.snapshot_download(repo, allow_patterns=["pytorch_model*.bin"], ignore_patterns=doubles)
    if not (path / "config.json").is_file():
        raise OctavoError(f"{repo} on the Hub has no config.json: name a repository in the transformers format.")
    return path


def require_known(model: str | Path) -> None:
    """Raise OctavoError unless the model is here, in the Hub's cache, or on the Hub, which is asked once.

    For the begin of a command: before torch is imported and anything is fetched."""
    if find_here(model) is not None:
        return
    import huggingface_hub

    if huggingface_hub.try_to_load_from_cache(str(model), "config.json") is None:
        with _hub_errors(str(model)):
            huggingface_hub.HfApi().model_info(str(model), timeout=HUB_SECONDS)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What goes wrong with the Hub in one sentence."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise OctavoError(f"{repo} is gated: accept its terms on the Hub, then run `hf auth login`.") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise OctavoError(
            f"Neither a directory with a config.json nor a model on the Hub is named {repo}: check the name, "
            "or run `hf auth login` if the model is private."
        ) from error
    except Exception as error:  # the many ways a network fails
        raise OctavoError(
            f"There is no directory {repo} with a config.json, and the Hub cannot be reached for a model of that name: "
            "check the name, or the network."
        ) from error


def is_directory(name: str, path: Path) -> bool:
    """Whether the user named a directory."""
    return path != BUNDLED and Path(name).is_dir() and Path(name).samefile(path)


def work_dir(name: str, path: Path) -> Path:
    """Where artefacts of a model go by default: its directory, or a cache for a Hub id, the bundled model, and where
    nothing can be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
    if not is_directory(name, path):
        return cache / name.replace("/", "--")
    return path if os.access(path, os.W_OK) else cache / str(path.resolve())[1:].replace("/", "--")


def find_artefact(file: str, name: str, path: Path) -> Path | None:
    """The artefact of that file name beside a model or in the cache; or in a directory that is named as a Hub id is
    (`--work-dir $MODEL`)."""
    places = [work_dir(name, path), path]
    places = places if is_directory(name, path) else [Path(name), *places]
    return next((place / file for place in places if (place / file).is_file()), None)
