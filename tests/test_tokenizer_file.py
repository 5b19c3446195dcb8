"""Which tokenizer.json files reach the library, and what becomes of its panics."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from l2p_lowvram import tokenizer_file
from l2p_lowvram.repository import DEMO_FOLDER
from l2p_lowvram.text import render_prompt
from l2p_lowvram.tokenizer_file import read_tokenizer
from offload import CheckpointError
from tests.test_golden_text import QWEN_PATTERN

DEMO = json.loads((DEMO_FOLDER / "tokenizer" / "tokenizer.json").read_text())
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SLOW = {"type": "Split", "pattern": {"Regex": r"(\w*)*!(\w*)*#"}, "behavior": "Isolated", "invert": False}


def written(folder: Path, /, **changed: Any) -> Path:
    """The embedded model's tokenizer with some of its members replaced; model__NAME is one of its model's."""
    values = copy.deepcopy(DEMO)
    for name, value in changed.items():
        outer, _, inner = name.rpartition("__")
        (values[outer] if outer else values)[inner] = value
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


def library_ids(path: Path, prompt: str) -> list[int]:
    return tokenizers.Tokenizer.from_file(str(path)).encode(render_prompt(prompt), add_special_tokens=False).ids


@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": {"type": "NFC"}, "post_processor": BYTE_LEVEL, "decoder": BYTE_LEVEL},
        {"normalizer": {"type": "NFKD"}, "post_processor": TEMPLATE},
        {"post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}},
        {"model__continuing_subword_prefix": "", "model__end_of_word_suffix": ""},
        {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}},
    ],
    ids=repr,
)
def test_what_qwens_tokenizers_consist_of_gives_the_librarys_ids(tmp_path: Path, changed: dict[str, Any]):
    path = written(tmp_path, **changed)
    prompt = "a caf\u0065\u0301, large 3 red circles'll \ufdfa\n\n  <|im_end|> tail "

    assert read_tokenizer(path)(prompt) == library_ids(path, prompt)


def test_truncation_and_padding_are_left_to_the_caller(tmp_path: Path):
    plain = read_tokenizer(written(tmp_path))("a large red circle")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    path = written(tmp_path, truncation=cut, padding={**padding, "pad_type_id": 0, "pad_token": "<|endoftext|>"})

    assert read_tokenizer(path)("a large red circle") == plain


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 28}}, "normalizer is of type 'Sequence'"),
        ({"normalizer": DOUBLING}, "normalizer is of type 'Replace'"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "normalizer is of type 'Precompiled'",
        ),
        ({"normalizer": ["NFC"]}, r"normalizer is \['NFC'\]"),
        ({"pre_tokenizer": None}, "pre_tokenizer is None"),
        ({"pre_tokenizer": SLOW}, "pre_tokenizer is of type 'Split'"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "pre_tokenizer is of type 'FixedLength'"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SLOW, BYTE_LEVEL]}},
            "pre_tokenizer is of type 'Split'",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 9}}, "pre_tokenizer is of type 'Seq"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": 3}}, "use_regex of pre_tokenizer is 3"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor is of type 'BertProcessing'"),
        ({"model": {"type": "WordPiece"}}, "model is of type 'WordPiece'"),
        ({"model": {"vocab": {}}}, "model is "),
        ({"model__dropout": 0.5}, r"model\.dropout is 0\.5"),
        ({"model__continuing_subword_prefix": "##"}, r"model\.continuing_subword_prefix is '##'"),
        ({"model__end_of_word_suffix": "w" * 9_000_000}, r"model\.end_of_word_suffix is 'w+\.\.\.w+'"),
        ({"model__vocab": [["a", 0]]}, r"model\.vocab is \[\['a', 0\]\]"),
        ({"model__vocab": {**DEMO["model"]["vocab"], "\x1b": 1 << 31}}, r"the id of token '\\x1b' is 2147483648"),
        ({"model__vocab": {"a": True}}, r"the id of token 'a' is True"),
        ({"model__vocab": {"a": -1}}, r"the id of token 'a' is -1"),
        ({"added_tokens": [{"id": 1 << 31, "content": "x"}]}, "an entry of added_tokens is "),
        ({"model__merges": None}, r"model\.merges is None"),
        ({"model__unk_token": 3}, r"model\.unk_token is 3"),
        ({"model__byte_fallback": "yes"}, r"model\.byte_fallback is 'yes'"),
        ({"added_tokens": {}}, r"added_tokens is \{\}"),
        ({"added_tokens": [{"id": 0, "content": "x" * 300}]}, "an entry of added_tokens is "),
        ({"added_tokens": [{"id": True, "content": "x"}]}, "an entry of added_tokens is "),
        ({"added_tokens": [{"id": 0, "content": "x", "lstrip": 1}]}, "lstrip of an added token is 1"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_everything_else_is_refused_by_name_before_the_library_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], told: str
):
    monkeypatch.setattr(tokenizers, "Tokenizer", None)
    path = written(tmp_path, **changed)

    with pytest.raises(
        CheckpointError, match=rf"tokenizer\.json: (a )?{told}.*; only the tokenizers of Qwen"
    ) as refused:
        read_tokenizer(path)

    assert len(refused.value.reason) < 200


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"{}", "model is None; only the tokenizers of Qwen"),
        (b"[]", "tokenizer.json must be a JSON object"),
        (b'{"model": ' + b"[" * 100_000, "tokenizer.json is nested too deeply"),
        (b'{"model": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        (b"\xff", "is not UTF-8"),
        (b" " * (33 << 20), "tokenizer.json is larger than the limit of 32.00 MiB"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, raw: bytes, told: str):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)

    with pytest.raises(CheckpointError) as refused:
        read_tokenizer(path)

    assert told in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_vocabulary_of_qwens_size_is_read_and_a_far_larger_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    letters = [chr(0x4E00 + number) for number in range(390)]
    pairs = [[first, second] for first in letters for second in letters][:151_387]
    tokens = ["a", *letters, *("".join(pair) for pair in pairs)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    path = written(tmp_path, model__vocab=vocabulary, model__merges=pairs, added_tokens=[])

    assert len(vocabulary) > 151_643
    read_tokenizer(path)

    monkeypatch.setattr(tokenizer_file, "_MAX_ENTRIES", 1000)
    with pytest.raises(CheckpointError, match=r"model\.vocab has 151778 entries, the limit is 1000"):
        read_tokenizer(path)


def test_what_the_library_refuses_is_a_value_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer\.json \(.*missing"):
        read_tokenizer(written(tmp_path, model__merges=[["missing", "a"]]))


def panic() -> type[BaseException]:
    """The library's own class, which no module offers."""
    hostile = {**DEMO, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    with pytest.raises(BaseException, match="Precompiled") as raised:
        tokenizers.Tokenizer.from_str(json.dumps(hostile))
    return raised.type


@pytest.mark.parametrize("stage", ["load", "encode"])
def test_a_panic_of_the_library_is_a_value_error_and_ctrl_c_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stage: str
):
    failure: type[BaseException] = panic()
    if issubclass(failure, Exception):
        pytest.skip("this release of tokenizers reports the panic as an error")

    class Failing:
        @staticmethod
        def from_str(text: str) -> Failing:
            if stage == "load":
                raise failure("no such luck")
            return Failing()

        def encode(self, text: str, *, add_special_tokens: bool) -> None:
            raise failure("no such luck")

    monkeypatch.setattr(tokenizers, "Tokenizer", Failing)
    path = written(tmp_path)

    with pytest.raises(ValueError, match=rf"{stage if stage == 'encode' else 'readable'}.*\(no such luck\)"):
        read_tokenizer(path)("a cat")
    failure = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        read_tokenizer(path)("a cat")
