"""Names in Python files, read without importing them: PyTorch alone takes seconds."""

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, did_you_mean, one_line

_DYNAMIC = (b"__getattr__", b"globals()", b"sys.modules", b"import *")
"""A module with one of these may have names that its text does not show."""


def check_dotted_path(path: str) -> None:
    """Check that a dotted path names something in a module, as far as its text tells.

    Raises:
        RecipeError: if there is no such module, it is not Python, or it does not define the name.
    """
    parts = path.split(".")
    lengths = range(len(parts), 0, -1)
    length = next((length for length in lengths if find_module(".".join(parts[:length]))), 0)
    if not length:
        if parts[0] not in sys.builtin_module_names and not _is_package(parts[0]):
            raise RecipeError(
                f"cannot import {'.'.join(parts[:-1]) or path} (it is neither in this folder nor on PYTHONPATH): No module "
                f"named {parts[0]!r}"
            )
        return
    module, names = ".".join(parts[:length]), parts[length:]
    file = find_module(module)
    try:
        known = {*_defined(_parse(file))}
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{file}: not valid Python: {one_line(error)}") from error
    if file.name == "__init__.py":
        known |= {entry.name.partition(".")[0] for entry in file.parent.iterdir()}
    if names and names[0] not in known and not any(sign in file.read_bytes() for sign in _DYNAMIC):
        raise RecipeError(f"{module} has no {names[0]!r}{did_you_mean(names[0], known)}")


def _is_package(name: str) -> bool:
    """Return whether a module is there in some form: compiled, or a plain folder."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # for `__main__`
        return True


def find_module(module: str) -> Path | None:
    """Return the Python file of a module; None if there is none."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # the top package alone: finding what is within it would run its code
    except ValueError:  # for `__main__`
        return None
    if spec is None:
        return None
    if not inner:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    stems = [Path(place, *inner) for place in spec.submodule_search_locations or ()]
    files = (file for stem in stems for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")))
    return next(filter(Path.is_file, files), None)


@functools.cache
def dataclass_fields(path: str) -> dict[str, str] | None:
    """Return the fields of a dataclass that its arguments set: name -> annotation.

    The order is that of `dataclasses.fields`. None if the class, or one that it inherits from, is not found.
    """
    found = _find_class(*path.rpartition(".")[::2])
    if found is None:
        return None
    module, definition = found
    fields: dict[str, str] = {}
    for base in reversed(definition.bases):
        inherited = _base_fields(module, ast.unparse(base))
        if inherited is None:
            return None
        fields |= inherited
    return fields | dict(_own_fields(definition))


def _base_fields(module: str, base: str) -> dict[str, str] | None:
    owner, _, name = base.rpartition(".")
    found = _find_class(module, name) if not owner else _find_class(owner, name)  # `trl.DPOConfig`: imported by that name
    return dataclass_fields(".".join([found[0], found[1].name])) if found else None


def _own_fields(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            options = {item.arg: item.value for item in node.value.keywords} if isinstance(node.value, ast.Call) else {}
            set_by_class = isinstance(options.get("init"), ast.Constant) and options["init"].value is False
            if not set_by_class and "ClassVar" not in annotation:
                yield node.target.id, annotation


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Return a class and its module, following imports."""
    file = find_module(module)
    if file is None:
        return None
    for node in _statements(_parse(file).body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(_imported_module(module, file, node), alias.name)
    return None


def _imported_module(module: str, file: Path, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module in `from ... import`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts[: len(parts) - node.level + (file.name == "__init__.py")]
    return ".".join([*package, *([node.module] if node.module else [])])


@functools.cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())  # Python finds out the encoding


def _statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Yield the statements of a module that are in no function or class."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for name in ("body", "handlers", "orelse", "finalbody", "cases"):
                inner = getattr(node, name, ())
                yield from _statements(inner if isinstance(inner, list) else ())  # an expression's `body` is no list


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines or imports."""
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        else:
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
