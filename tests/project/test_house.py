"""The structure: imports go from higher packages to lower ones, files are short, docstrings begin briefly."""

import ast
from graphlib import CycleError, TopologicalSorter

from support import ROOT

import pytest

# Lowest first: each imports from those above it in this list only. `tiny` and `geography` are for recipes, configs and tests.
LAYERS = ("core", "config", "stages", "inputs", "data", "models", "rewards", "generation", "memory", "export", "training")
LAYERS += ("evaluation", "feedback", "pipeline", "chat", "cli")
WORLDS = ("tiny", "geography")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in (ROOT / "rlhf_recipes").rglob("*.py")}


def imported(path):
    """Yield the modules that a file imports, at its top or anywhere else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


def with_packages(module, names):
    """Yield modules and their packages, except those that contain `module`."""
    for name in names:
        packages = [name.rsplit(".", depth)[0] for depth in range(1, name.count("."))]
        yield from (one for one in packages if "." in one and not f"{module}.".startswith(f"{one}."))
        yield name


GRAPH = {module: {*with_packages(module, imported(path))} for module, path in MODULES.items()}


def test_no_two_files_import_each_other():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_packages_import_from_lower_ones_only():
    def layer(module):
        name = module.split(".")[1] if "." in module else ""
        return LAYERS.index(name) if name in LAYERS else None

    places = {module: layer(module) for module in MODULES}
    upward = {
        f"{module} -> {other}"
        for module, names in GRAPH.items()
        for other in names
        if None not in (places.get(module), places.get(other)) and places[other] > places[module]
    }
    assert not upward


def test_every_package_has_its_layer():
    names = {module.split(".")[1] for module in MODULES if "." in module}
    assert names <= {*LAYERS, *WORLDS}


def test_library_imports_neither_worlds_nor_recipes():
    for module, names in GRAPH.items():
        for world in (f"rlhf_recipes.{name}" for name in WORLDS):
            assert module.startswith(world) or not any(name.startswith(world) for name in names), module
        assert not [name for name in names if name.split(".")[0] in ("recipes", "tests", "benchmarks")], module


def test_recipes_do_not_import_each_other():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    for path in (ROOT / "recipes").glob("*.py"):
        assert not recipes & set(imported(path)), path
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(path.read_text()))), path


LONGEST_FILE, LONGEST_SUMMARY = 400, 80


def test_no_file_of_the_library_is_long():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: length for module, length in lengths.items() if length > LONGEST_FILE}


def test_docstrings_begin_with_one_short_sentence():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    paths = [*MODULES.values(), *(ROOT / "recipes").glob("*.py")]
    nodes = [(path, node) for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    summaries = [(path, (ast.get_docstring(node) or "").partition("\n")[0]) for path, node in nodes]
    assert not [f"{path.name}: {line}" for path, line in summaries if len(line) > LONGEST_SUMMARY]
