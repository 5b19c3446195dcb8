"""`tokenizer.json`, hostile until checked: only what Qwen's tokenizers consist of reaches the library that runs it.

The format can say much more: replacements that double a text at every step, expressions that take for ever on it,
parts on which the library panics. All of that runs in native code, where Ctrl-C does not reach.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from offload import CheckpointError, format_bytes
from offload.header import parse_json_object, shown

from .text import PromptTokenizer

# Qwen3's has 11 MB. Parsed JSON takes up to some 25 times its text.
_MAX_FILE_BYTES = 32 << 20
# Qwen3 has 151,643 tokens, 151,387 merges and 26 tokens added to them, none longer than 128 characters.
_MAX_ENTRIES = _MAX_IDS = 1 << 20
_MAX_ADDED_TOKENS = 1024
_MAX_ADDED_CHARACTERS = 256
_NORMALIZERS = frozenset({"NFC", "NFKC", "NFD", "NFKD"})
# None of them changes a token while no special tokens are asked for, so they are not run.
_POST_PROCESSORS = frozenset({"ByteLevel", "TemplateProcessing"})
# How Qwen 2 to 3 cut a text into the pieces that merges stay within.
_QWEN_SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
_MODEL_FLAGS = ("fuse_unk", "byte_fallback", "ignore_merges")


def read_tokenizer(path: Path) -> PromptTokenizer:
    """Raises CheckpointError where the file is no tokenizer such as Qwen's, ValueError where the library refuses it."""
    from tokenizers import Tokenizer

    checked = json.dumps(_checked(_parsed(path), path))
    with _native(f"{path}: not a readable tokenizer.json"):
        tokenizer = Tokenizer.from_str(checked)

    def encode(text: str) -> Sequence[int]:
        with _native(f"{path}: the tokenizer cannot encode this prompt"):
            ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return PromptTokenizer(encode, hashlib.sha256(checked.encode()).hexdigest())


@contextmanager
def _native(failure: str) -> Iterator[None]:
    """Around the library, which raises bare Exception for bad files and texts, and panics past that class."""
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"{failure} ({error!s:.200})") from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise CheckpointError(path, f"tokenizer.json is larger than the limit of {format_bytes(_MAX_FILE_BYTES)}")
    return parse_json_object(raw, path, "tokenizer.json", floats=True)


def _checked(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The tokenizer that the library may build: what is known of it and was looked at, nothing else.

    Prompts are cut elsewhere and never padded, and tokens are not turned into text again.
    """
    model = _model(values.get("model"), path)
    if not _is_post_processor(values.get("post_processor")):
        _refuse(path, "post_processor", values["post_processor"])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(values.get("added_tokens"), path),
        "normalizer": _normalizer(values.get("normalizer"), path),
        "pre_tokenizer": _pre_tokenizer(values.get("pre_tokenizer"), path),
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def _refuse(path: Path, what: str, value: object) -> NoReturn:
    kind = value.get("type") if isinstance(value, dict) else None
    found = f"of type {kind!r:.60}" if isinstance(kind, str) else f"{reprlib.repr(value):.60}"
    raise CheckpointError(path, f"{what} is {found}; only the tokenizers of Qwen 2 to 3 are supported")


def _require_few(entries: Sized, what: str, limit: int, path: Path) -> None:
    if len(entries) > limit:
        raise CheckpointError(path, f"{what} has {len(entries)} entries, the limit is {limit}")


def _model(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "BPE":
        _refuse(path, "model", value)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if value.get(name) not in (None, ""):
            _refuse(path, f"model.{name}", value[name])
    if value.get("dropout") is not None:
        _refuse(path, "model.dropout", value["dropout"])
    known: dict[str, Any] = {"type": "BPE"}
    for name, kind in (("vocab", dict), ("merges", list)):
        if not isinstance(value.get(name), kind):
            _refuse(path, f"model.{name}", value.get(name))
        _require_few(value[name], f"model.{name}", _MAX_ENTRIES, path)
        known[name] = value[name]
    for token, number in known["vocab"].items():
        if not _is_id(number):
            _refuse(path, f"the id of token {shown(token)}", number)
    unknown = value.get("unk_token")
    if not (unknown is None or isinstance(unknown, str)):
        _refuse(path, "model.unk_token", unknown)
    return {**known, "unk_token": unknown, **{name: _flag(value, name, f"model.{name}", path) for name in _MODEL_FLAGS}}


def _flag(values: Mapping[str, Any], name: str, what: str, path: Path) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        _refuse(path, what, value)
    return value


def _added_tokens(value: object, path: Path) -> list[dict[str, Any]]:
    """Texts that are one token wherever they stand."""
    if value is None:
        return []
    if not isinstance(value, list):
        _refuse(path, "added_tokens", value)
    _require_few(value, "added_tokens", _MAX_ADDED_TOKENS, path)
    return [_added_token(entry, path) for entry in value]


def _added_token(entry: object, path: Path) -> dict[str, Any]:
    content, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
    fits = isinstance(content, str) and 0 < len(content) <= _MAX_ADDED_CHARACTERS
    if not isinstance(entry, dict) or not fits or not _is_id(number):
        _refuse(path, "an entry of added_tokens", entry)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        "id": number,
        "content": content,
        **{name: _flag(entry, name, f"{name} of an added token", path) for name in flags},
    }


def _is_id(value: object) -> bool:
    """Within what a vocabulary has: parts of the library count up to the largest."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_IDS


def _normalizer(value: object, path: Path) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type") not in _NORMALIZERS:
        _refuse(path, "normalizer", value)
    return {"type": value["type"]}


def _pre_tokenizer(value: object, path: Path) -> dict[str, Any]:
    """ByteLevel, alone or after Qwen's Split."""
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = value.get("pretokenizers")
        if not isinstance(steps, list) or len(steps) not in (1, 2):
            _refuse(path, "pre_tokenizer", value)
        if len(steps) == 2 and steps[0] != _QWEN_SPLIT:
            _refuse(path, "a pre_tokenizer", steps[0])
        return {"type": "Sequence", "pretokenizers": [*steps[:-1], _byte_level(steps[-1], path)]}
    return _byte_level(value, path)


def _byte_level(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "ByteLevel":
        _refuse(path, "pre_tokenizer", value)
    flags = ("add_prefix_space", "trim_offsets", "use_regex")
    said = {name: _flag(value, name, f"{name} of pre_tokenizer", path) for name in flags if name in value}
    return {"type": "ByteLevel", **said}


def _is_post_processor(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = value.get("processors")
        return isinstance(steps, list) and all(isinstance(step, dict) and _is_post_processor(step) for step in steps)
    return isinstance(value, dict) and value.get("type") in _POST_PROCESSORS
