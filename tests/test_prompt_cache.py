"""Prompt features on disk: same bits back, bounded, and never a reason for a run to fail."""

import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from l2p_lowvram import prompt_cache
from l2p_lowvram.prompt_cache import PromptCache, default_folder

KEY = PromptCache.key("encoder", "a fox", torch.float32, "cpu")
FEATURES = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
ENTRY_BYTES = len(save({KEY: FEATURES}))


def other_key(index: int) -> str:
    return PromptCache.key("encoder", f"prompt {index}", torch.float32, "cpu")


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_to_the_last_bit(cache: PromptCache, dtype: torch.dtype) -> None:
    features = FEATURES.to(dtype)

    cache.put(KEY, features)

    found = cache.get(KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, features)


def test_views_and_inference_tensors_are_kept_too(cache: PromptCache) -> None:
    with torch.inference_mode():
        features = torch.randn(8, 5).T
        cache.put(KEY, features)

    found = cache.get(KEY)
    assert found is not None
    assert torch.equal(found, features)
    assert not found.is_inference()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_entry_of_a_dtype_that_is_never_written_is_removed(cache: PromptCache, dtype: torch.dtype) -> None:
    cache.folder.mkdir()
    path = cache.folder / f"{KEY}.safetensors"
    save_file({KEY: torch.ones(5, 8).to(dtype)}, path)

    assert cache.get(KEY) is None
    assert not path.exists()


def test_features_of_another_release_of_torch_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "99.0")

    assert PromptCache.key("encoder", "a fox", torch.float32, "cpu") != KEY


def test_an_unknown_key_is_a_miss_and_makes_no_folder(cache: PromptCache) -> None:
    assert cache.get(KEY) is None
    assert not cache.folder.exists()


def test_a_key_depends_on_all_its_parts() -> None:
    keys = {
        KEY,
        PromptCache.key("encoder2", "a fox", torch.float32, "cpu"),
        PromptCache.key("encoder", "a fox ", torch.float32, "cpu"),
        PromptCache.key("encoder", "a fox", torch.bfloat16, "cpu"),
        PromptCache.key("encoder", "a fox", torch.float32, "cuda"),
        PromptCache.key("encoder a", " fox", torch.float32, "cpu"),
    }

    assert len(keys) == 6
    assert all(len(key) == 64 for key in keys)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 100,
        pickle.dumps(FEATURES),
        save({KEY: FEATURES})[:-1],
        save({other_key(1): FEATURES}),
        save({KEY: FEATURES, "more": FEATURES.clone()}),
        save({KEY: FEATURES[0]}),
        save({KEY: torch.zeros(0, 8)}),
        save({KEY: torch.ones(5, 8, dtype=torch.int8)}),
        save({KEY: torch.full((5, 8), float("nan"))}),
    ],
    ids=["empty", "noise", "pickle", "cut", "other key", "two", "1-D", "no token", "integers", "nan"],
)
def test_a_file_that_is_no_entry_is_a_miss_and_removed(cache: PromptCache, raw: bytes) -> None:
    cache.folder.mkdir()
    path = cache.folder / f"{KEY}.safetensors"
    path.write_bytes(raw)

    assert cache.get(KEY) is None
    assert not path.exists()


def test_no_more_than_an_entry_can_hold_is_read(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, FEATURES)

    monkeypatch.setattr(prompt_cache, "MAX_ENTRY_BYTES", ENTRY_BYTES - 1)

    assert cache.get(KEY) is None


def test_the_least_recently_used_entries_make_room(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, max_bytes=3 * ENTRY_BYTES)
    for index in range(3):
        cache.put(other_key(index), FEATURES)
        os.utime(tmp_path / f"{other_key(index)}.safetensors", ns=(index, index))
    cache.get(other_key(0))  # now the most recently used

    cache.put(KEY, FEATURES)

    kept = [key for key in (other_key(0), other_key(1), other_key(2), KEY) if cache.get(key) is not None]
    assert kept == [other_key(0), other_key(2), KEY]


def test_tidying_touches_no_file_of_others(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("notes.txt", "model.safetensors", ".hidden.tmp")]
    for path in others:
        path.write_bytes(b"x" * 10_000)
        os.utime(path, ns=(0, 0))
    cache = PromptCache(tmp_path, max_bytes=ENTRY_BYTES)

    cache.put(other_key(0), FEATURES)
    cache.put(KEY, FEATURES)

    assert all(path.exists() for path in others)
    assert cache.get(KEY) is not None


def test_what_a_killed_process_left_is_cleared_after_a_while(tmp_path: Path) -> None:
    old, fresh = tmp_path / f".{'0' * 16}.tmp", tmp_path / f".{'1' * 16}.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)

    PromptCache(tmp_path).put(KEY, FEATURES)

    assert not old.exists()
    assert fresh.exists()


def test_features_larger_than_the_whole_cache_are_not_kept(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, max_bytes=ENTRY_BYTES - 1)

    cache.put(KEY, FEATURES)

    assert list(tmp_path.iterdir()) == []
    assert cache.warning is None


def test_a_folder_that_cannot_be_written_costs_one_warning_and_nothing_else(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = PromptCache(blocked / "prompts")

    cache.put(KEY, FEATURES)
    cache.put(KEY, FEATURES)

    assert cache.get(KEY) is None
    assert cache.warning == (
        f"prompt cache {blocked / 'prompts'} cannot be written (not a directory); prompts are encoded anew each run"
    )


def test_a_folder_under_an_entry_name_is_a_miss(cache: PromptCache) -> None:
    (cache.folder / f"{KEY}.safetensors").mkdir(parents=True)

    assert cache.get(KEY) is None


def test_an_interrupted_put_leaves_nothing(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, FEATURES)

    assert list(cache.folder.iterdir()) == []


def test_entries_are_ordinary_safetensors_files(cache: PromptCache) -> None:
    cache.folder.mkdir()
    save_file({KEY: FEATURES}, cache.folder / f"{KEY}.safetensors")

    found = cache.get(KEY)

    assert found is not None
    assert torch.equal(found, FEATURES)


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, ".cache/l2p_lowvram/prompts"),
        ("linux", {"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/l2p_lowvram/prompts"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache/l2p_lowvram/prompts"),
        ("darwin", {"XDG_CACHE_HOME": "{home}/xdg"}, "Library/Caches/l2p_lowvram/prompts"),
        ("win32", {"LOCALAPPDATA": "{home}/local"}, "local/l2p_lowvram/prompts"),
        ("win32", {}, "AppData/Local/l2p_lowvram/prompts"),
    ],
)
def test_the_default_folder_follows_the_platform(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    environment: dict[str, str],
    expected: str,
) -> None:
    monkeypatch.setattr(prompt_cache.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))

    assert default_folder() == tmp_path / expected
    assert not default_folder().exists()


def test_without_a_home_folder_there_is_still_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)

    assert default_folder().is_absolute()


def test_a_link_under_an_entry_name_is_replaced_not_followed(cache: PromptCache, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"somebody's file")
    cache.folder.mkdir()
    path = cache.folder / f"{KEY}.safetensors"
    path.symlink_to(other)

    cache.put(KEY, FEATURES)

    assert other.read_bytes() == b"somebody's file"
    assert not path.is_symlink()
    assert cache.get(KEY) is not None


def test_tidying_survives_what_is_no_file_under_an_entry_name(cache: PromptCache) -> None:
    """The oldest of all, so that they are met before the entries that have to go."""
    cache.folder.mkdir()
    loop, folder = (cache.folder / f"{other_key(index)}.safetensors" for index in (1, 2))
    loop.symlink_to(loop)
    folder.mkdir()
    (cache.folder / ".0123456789abcdef.tmp").mkdir()
    for path in cache.folder.iterdir():
        os.utime(path, ns=(1, 1), follow_symlinks=False)
    cache.max_bytes = ENTRY_BYTES

    cache.put(other_key(3), FEATURES)
    cache.put(KEY, FEATURES)

    assert cache.warning is None
    assert cache.get(KEY) is not None
    assert cache.get(other_key(3)) is None
    assert folder.is_dir()
