"""Imports point downwards: read from the sources, so nothing has to be importable."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "offload": {"offload", "torch", "numpy", "psutil"},
    "tiling": {"tiling", "torch", "numpy"},
}
# Plain PyTorch that runs alone: the same code is the product and the oracle.
PLAIN_MODULES = ("model", "decoder", "text", "sampling", "linear", "config")
REQUIRED_MODULES = ("model", "decoder", "text", "sampling")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names a module of `package` imports: at any depth, under TYPE_CHECKING, or by name at run time.

    `from a import b` counts as both `a` and `a.b`, since b may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names.update(arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def package_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).parent.parts)


def foreign_imports(package: str, root: Path) -> dict[str, set[str]]:
    """File of `package` → top-level names it imports beyond those allowed and the standard library."""
    allowed = ALLOWED[package] | sys.stdlib_module_names
    found = {
        str(path.relative_to(root)): top_level(imported_modules(path.read_text(), package_of(path, root))) - allowed
        for path in sorted((root / package).rglob("*.py"))
    }
    return {path: names for path, names in found.items() if names}


def reached_packages(module: str, root: Path) -> set[str]:
    """Top-level names imported by `l2p_lowvram.<module>` or by any l2p_lowvram module it leads to.

    The package's own `__init__` is left out: it only gathers public names.
    """
    seen: set[str] = set()
    waiting = [f"l2p_lowvram.{module}"]
    packages: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = root / (name.replace(".", "/") + ".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        imported = imported_modules(path.read_text(), package_of(path, root))
        packages |= top_level(imported)
        waiting += [other for other in imported if other.startswith("l2p_lowvram.")]
    return packages


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_generic_packages_import_only_what_they_may(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert foreign_imports(package, ROOT) == {}


@pytest.mark.parametrize("module", REQUIRED_MODULES)
def test_plain_modules_exist(module: str) -> None:
    assert (ROOT / "l2p_lowvram" / f"{module}.py").is_file()


@pytest.mark.parametrize("module", [name for name in PLAIN_MODULES if (ROOT / "l2p_lowvram" / f"{name}.py").is_file()])
def test_plain_modules_reach_neither_offload_nor_tiling(module: str) -> None:
    assert not reached_packages(module, ROOT) & {"offload", "tiling"}


def imported_at_once(path: Path, root: Path) -> set[str]:
    """Modules of l2p_lowvram that importing this file imports: not those of functions and of TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    kept = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    source = "\n".join(ast.unparse(node) for node in kept)
    names = imported_modules(source, package_of(path, root))
    return {name for name in names if (root / (name.replace(".", "/") + ".py")).is_file()}


def test_modules_import_each_other_in_no_circle() -> None:
    paths = sorted((ROOT / "l2p_lowvram").rglob("*.py"))
    left = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported_at_once(path, ROOT) for path in paths}

    while free := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in free:
            del left[name]

    assert left == {}


def test_the_pipeline_is_composed_for_commands_and_by_nothing_below() -> None:
    users = {
        path.stem
        for path in (ROOT / "l2p_lowvram").rglob("*.py")
        if "l2p_lowvram.pipeline" in imported_modules(path.read_text(), package_of(path, ROOT))
    }

    assert users == {"__init__", "generate", "selftest"}


def test_files_are_named_after_what_they_hold() -> None:
    folders = [ROOT / name for name in ("l2p_lowvram", "offload", "tiling", "benchmarks", "tests")]

    paths = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]

    assert [path for path in paths if path.stem in VAGUE_NAMES] == []


@pytest.mark.parametrize(
    "line",
    [
        "import l2p_lowvram.model",
        "from l2p_lowvram import config",
        "from tiling.spans import spans",
        "import os, tiling",
        "def late():\n    import tiling",
        "if TYPE_CHECKING:\n    from tiling import Span",
        "import importlib\nimportlib.import_module('tiling')",
        "import PIL",
    ],
)
def test_the_check_catches_an_import_that_points_upwards(line: str, tmp_path: Path) -> None:
    (tmp_path / "offload").mkdir()
    (tmp_path / "offload" / "fine.py").write_text("import os\nimport torch\nfrom . import sizes\n")
    (tmp_path / "offload" / "wrong.py").write_text(line)

    assert list(foreign_imports("offload", tmp_path)) == ["offload/wrong.py"]


@pytest.mark.parametrize(
    "line",
    [
        "from .weights import load",
        "from . import weights",
        "from l2p_lowvram import weights",
        "import offload",
    ],
)
def test_the_check_follows_a_plain_module_through_its_neighbours(line: str, tmp_path: Path) -> None:
    (tmp_path / "l2p_lowvram").mkdir()
    (tmp_path / "l2p_lowvram" / "model.py").write_text(line)
    (tmp_path / "l2p_lowvram" / "weights.py").write_text("from offload import Checkpoint")

    assert "offload" in reached_packages("model", tmp_path)
