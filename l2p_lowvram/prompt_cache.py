"""Prompt features kept on disk, so that a rerun with another seed skips the text encoder.

One safetensors file per prompt, named by its key, holding one tensor of that name. Files are untrusted:
anything that is not exactly that is removed and counts as a miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from .whole_file import whole_file

# Part of every key: raise it when features of the same prompt change.
KEY_VERSION = 2
# Of features.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_MAX_BYTES = 256 << 20
# 512 tokens of width 8192 in fp32, twice what the largest known encoder makes, take 16 MiB.
MAX_ENTRY_BYTES = 32 << 20
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.tmp")
_LEFTOVER_AGE_SECONDS = 3600


def default_folder() -> Path:
    """The user's cache folder for prompt features, by the platform's custom. Not created here."""
    if sys.platform == "win32":
        variable, customary = "LOCALAPPDATA", Path("AppData/Local")
    else:
        variable, customary = "XDG_CACHE_HOME", Path(".cache")
        if sys.platform == "darwin":
            variable, customary = "", Path("Library/Caches")
    named = Path(os.environ.get(variable, "")) if variable else Path()
    if named.is_absolute():  # the XDG rule: a relative path is to be ignored
        return named / "l2p_lowvram" / "prompts"
    try:
        return Path.home() / customary / "l2p_lowvram" / "prompts"
    except RuntimeError:  # an account without a home folder
        return Path(tempfile.gettempdir()) / "l2p_lowvram" / "prompts"


class PromptCache:
    """Feature tensors by key; nothing here ever fails a run.

    folder: None for `default_folder()`; made on the first `put`. max_bytes: least recently used entries
    are removed beyond it. warning: why the cache is not written to, once that was found out.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = default_folder() if folder is None else folder
        self.max_bytes = max_bytes
        self.warning: str | None = None

    @staticmethod
    def key(identity: str, rendered_prompt: str, dtype: torch.dtype, device: str) -> str:
        """identity: of the encoder *and* the tokenizer. Devices and releases of torch round differently, hence their
        place."""
        # A JSON list keeps the parts apart: no two lists have the same text.
        parts = json.dumps([KEY_VERSION, identity, rendered_prompt, str(dtype), device, torch.__version__])
        return hashlib.sha256(parts.encode()).hexdigest()

    def get(self, key: str) -> Tensor | None:
        """The features (tokens, width) on the CPU, or None. Marks them as used."""
        path = self._path(key)
        try:
            if path.is_symlink() or not path.is_file():
                return None
            with path.open("rb") as file:
                raw = file.read(MAX_ENTRY_BYTES + 1)
        except OSError:
            return None
        features = _parse(raw, key)
        with suppress(OSError):
            if features is None:
                path.unlink()
            else:
                os.utime(path)
        return features

    def put(self, key: str, features: Tensor) -> None:
        """Keep `features` (tokens, width), from any device; they are copied."""
        raw = save({key: features.detach().cpu().contiguous()})
        if self.warning is not None or len(raw) > min(self.max_bytes, MAX_ENTRY_BYTES):
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._path(key)
            if path.is_symlink():  # none of ours; writing would follow it, and replace what it leads to
                path.unlink()
            with whole_file(path, overwrite=True) as file:
                file.write(raw)
            self._remove_oldest()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            self.warning = f"prompt cache {self.folder} cannot be written ({reason}); prompts are encoded anew each run"

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _remove_oldest(self) -> None:
        """Keep to max_bytes, and clear what a killed process left half-written. Only files of ours."""
        entries: list[tuple[int, int, Path]] = []  # (time of last use, bytes, path)
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process may be tidying up too
                status = path.lstat()
                if _ENTRY.fullmatch(path.name) and not stat.S_ISDIR(status.st_mode):
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif _LEFTOVER.fullmatch(path.name) and time.time() - status.st_mtime > _LEFTOVER_AGE_SECONDS:
                    path.unlink()
        excess = sum(nbytes for _, nbytes, _ in entries) - self.max_bytes
        for _, nbytes, path in sorted(entries):
            if excess <= 0:
                return
            with suppress(OSError):  # the next one will do
                path.unlink(missing_ok=True)
                excess -= nbytes


def _parse(raw: bytes, key: str) -> Tensor | None:
    """The one tensor of an entry, or None for bytes that are anything else."""
    if len(raw) > MAX_ENTRY_BYTES:
        return None
    try:
        tensors = load(raw)
    except Exception:  # whatever the parser thinks of foreign bytes, they are a miss
        return None
    features = tensors.get(key)
    if len(tensors) != 1 or features is None or features.dim() != 2 or not features.numel():
        return None
    if features.dtype not in _DTYPES or not bool(features.isfinite().all()):
        return None
    return features
