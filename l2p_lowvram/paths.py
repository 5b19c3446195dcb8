"""Names of files as people give them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from offload.checkpoint import INDEX_SUFFIX

# What may lie in a model's folder, beside its weights, and is read with them.
SETTINGS_FILE, CONFIG_FILE, TOKENIZER_FILE = "l2p.json", "config.json", "tokenizer.json"
TOKENIZER_FOLDER, TEXT_ENCODER_FOLDER = "tokenizer", "text_encoder"
_BESIDE = (SETTINGS_FILE, CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_FOLDER, TEXT_ENCODER_FOLDER)

# In place of a path: the model that comes along.
DEMO = "demo"


def model_folder(path: Path) -> Path | None:
    """The folder whose other files belong to the model: itself, or that of a file named `model*`, since a folder of
    many models has no single text encoder and no single set of defaults."""
    if path.is_dir():
        return path
    return path.parent if path.name.startswith("model") else None


def expanded(path: str | os.PathLike[str]) -> Path:
    """With ~ filled in. Raises FileNotFoundError for a user there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such user", str(path)) from error


def destination(path: Path) -> Path:
    """Where a file of that name lies: what a link leads to. A link that leads round in circles is itself."""
    # Not Path.resolve, which raises for those on some Pythons.
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def same_file_key(path: Path) -> str:
    """Equal for two names of one place, whether there is a file yet or not."""
    return os.path.normcase(os.path.realpath(path))


def parts_of(path: Path) -> list[Path]:
    """A model or text encoder, and what is read along with a file of that name, whether it is there or not."""
    return [path] if path.is_dir() else [path, *(path.parent / name for name in _BESIDE)]


def belongs_to(path: Path, source: Path) -> bool:
    """Whether `path` is `source`, or lies in it, a folder that is read, or beside it, an index that names files."""
    if not path.exists():
        return False
    place, read = Path(same_file_key(path)), Path(same_file_key(source))
    if read.name.endswith(INDEX_SUFFIX):
        return place.parent == read.parent and place.name.endswith((".safetensors", INDEX_SUFFIX))
    return place == read or (read.is_dir() and read in place.parents)
