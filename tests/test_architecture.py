"""The layers and walls of the package, read from its imports; limits on files and functions.

Run as a script it prints the lines of every package: `python tests/test_architecture.py`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "quantempo"

# From the top down; a unit imports only units of the rows below its own. The number is the layer
# that docstrings name. Within L5 the rows stand on each other in this order.
ROWS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (6, ("cli",)),
    (5, ("ladder",)),
    (5, ("demo", "study")),
    (5, ("quality", "sensitivity", "speed", "speed_gpu")),
    (5, ("pipeline",)),
    (5, ("session",)),
    (5, ("timing",)),
    (5, ("bench", "layer_table", "rungs")),
    (4, ("rounding", "evaluate", "export")),
    (3, ("calibrate", "backends")),
    (2, ("quantizers",)),
    (1, ("search", "models", "report")),
    (0, ("core", "kernels", "recipe", "runs")),
    (0, ("registry", "version")),
    (0, ("errors",)),
)
ROW_OF = {unit: row for row, (_, units) in enumerate(ROWS) for unit in units}
LAYER_OF = {unit: layer for layer, units in ROWS for unit in units}

# What a unit may see of the project, where that is less than the rows below it.
ONLY = {
    "kernels": {"kernels"},
    "report": {"report", "errors", "runs", "registry"},
}
NEVER = {"evaluate": {"quantizers", "models", "calibrate", "backends"}}
THIRD_PARTY_ONLY = {"kernels": {"torch", "numpy", "triton"}}
DIFFUSERS_AT = ("models/", "export/diffusers_plugin.py")

MAX_FILE = 400
MAX_FUNCTION = 60
MAX_KERNEL_FUNCTION = 120
HEAVY = ("jinja2", "matplotlib", "nncf", "onnx", "openvino", "torchmetrics", "transformers")

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted((REPOSITORY / "tests").rglob("*.py"))


def unit_of(path: Path) -> str:
    """Return the unit (package or module under `quantempo`) of a file, "" for the root itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first in ("__init__.py", "__main__.py") else first.removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, those inside functions included."""
    package = ["quantempo", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def refusal(unit: str, where: str, name: str) -> str | None:
    """Return why module `where` of `unit` may not import the dotted `name`, or None."""
    root, _, rest = name.partition(".")
    if root != "quantempo":
        if root == "diffusers" and not where.startswith(DIFFUSERS_AT):
            return f"only {' and '.join(DIFFUSERS_AT)} import diffusers"
        allowed = THIRD_PARTY_ONLY.get(unit)
        if allowed is not None and root not in allowed | set(sys.stdlib_module_names):
            return f"{unit} imports only {sorted(allowed)} and the standard library"
        return None
    target = rest.partition(".")[0]
    # A unit without a row is the business of `test_every_unit_has_a_layer`.
    if target == unit or target == "__version__" or unit not in ROW_OF:
        return None
    if target not in ROW_OF:
        return f"'{target}' is no unit of the package; import from the module that defines it"
    if target not in ONLY.get(unit, ROW_OF) or target in NEVER.get(unit, ()):
        return f"{unit} must not see {target}"
    if ROW_OF[target] <= ROW_OF[unit]:
        return f"{unit} (L{LAYER_OF[unit]}) must not import {target} (L{LAYER_OF[target]})"
    return None


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name:line, lines) of every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{node.name}:{node.lineno}", (node.end_lineno or 0) - node.lineno + 1


def lines_per_unit() -> dict[str, tuple[int, int]]:
    """Return unit -> (files, lines), the root as "quantempo"."""
    table: dict[str, tuple[int, int]] = {}
    for path in MODULES:
        unit = unit_of(path) or "quantempo"
        files, lines = table.get(unit, (0, 0))
        table[unit] = files + 1, lines + path.read_text().count("\n")
    return table


def test_every_unit_has_a_layer() -> None:
    unknown = {unit_of(path) for path in MODULES} - set(ROW_OF) - {""}
    assert not unknown, f"give {sorted(unknown)} a row in ROWS"


def test_imports_point_downwards_and_respect_the_walls() -> None:
    broken = []
    for path in MODULES:
        where = path.relative_to(PACKAGE).as_posix()
        for line, name in imported(path, ast.parse(path.read_text())):
            reason = refusal(unit_of(path), where, name)
            if reason:
                broken.append(f"{where}:{line}: {name}: {reason}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("core/affine.py", "quantempo.models.family"),
        ("core/affine.py", "quantempo.runs"),
        ("search/scale.py", "quantempo.models.family"),
        ("calibrate/trace.py", "quantempo.backends.base"),
        ("kernels/reference.py", "quantempo.core.spec"),
        ("kernels/reference.py", "diffusers"),
        ("kernels/reference.py", "scipy.stats"),
        ("evaluate/fidelity.py", "quantempo.quantizers"),
        ("evaluate/fidelity.py", "quantempo.models.family"),
        ("report/html.py", "quantempo.core"),
        ("backends/base.py", "diffusers.models"),
        ("export/checkpoint.py", "diffusers"),
        ("pipeline.py", "quantempo.demo"),
        ("pipeline.py", "quantempo.Recipe"),
    ],
)
def test_the_rule_refuses(where: str, name: str) -> None:
    assert refusal(unit_of(PACKAGE / where), where, name) is not None


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("core/affine.py", "quantempo.errors"),
        ("kernels/reference.py", "torch.nn.functional"),
        ("report/html.py", "quantempo.runs"),
        ("models/family.py", "diffusers"),
        ("export/diffusers_plugin.py", "diffusers.quantizers"),
        ("demo.py", "quantempo.pipeline"),
        ("cli/__init__.py", "quantempo.bench"),
        ("__init__.py", "quantempo.pipeline"),
    ],
)
def test_the_rule_allows(where: str, name: str) -> None:
    assert refusal(unit_of(PACKAGE / where), where, name) is None


def test_imports_are_found_wherever_they_stand() -> None:
    code = (
        "import a.b\n"
        "def f():\n"
        "    from quantempo import core\n"
        "    from . import spec\n"
        "    from ..search.scale import s\n"
        "    import_module('quantempo.export')\n"
    )
    names = [name for _, name in imported(PACKAGE / "core" / "x.py", ast.parse(code))]
    assert names == [
        "a.b",
        "quantempo.core",
        "quantempo.core.spec",
        "quantempo.search.scale.s",
        "quantempo.export",
    ]


def test_files_are_short() -> None:
    long = {str(path.relative_to(REPOSITORY)): path.read_text().count("\n") for path in SOURCES}
    long = {name: lines for name, lines in long.items() if lines > MAX_FILE}
    assert not long, f"over {MAX_FILE} lines: {long}"


def test_functions_are_short() -> None:
    long = []
    for path in SOURCES:
        kernel = path.is_relative_to(PACKAGE) and unit_of(path) == "kernels"
        limit = MAX_KERNEL_FUNCTION if kernel else MAX_FUNCTION
        for name, lines in functions(ast.parse(path.read_text())):
            if lines > limit:
                long.append(f"{path.relative_to(REPOSITORY)}:{name}: {lines} lines, limit {limit}")
    assert not long, "\n".join(long)


def test_modules_say_what_they_are() -> None:
    broken = []
    for path in MODULES:
        where, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())
        text = ast.get_docstring(tree) or ""
        if len(text) < 20:
            broken.append(f"{where}: no module docstring worth the name")
        for layer in re.findall(r"layer L(\d)", text):
            if LAYER_OF.get(unit_of(path), int(layer)) != int(layer):
                broken.append(f"{where}: says layer L{layer}, is in L{LAYER_OF[unit_of(path)]}")
        targets = [
            target
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        ]
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            broken.append(f"{where}: no __all__")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "code",
    [
        "import quantempo",
        "from quantempo.cli import main\nsys.argv = ['quantempo', '--help']\nmain()",
    ],
    ids=["import", "help"],
)
def test_heavy_packages_are_imported_late(code: str) -> None:
    # diffusers imports transformers by itself, so what counts is what we add to it.
    script = (
        "import sys, diffusers.quantizers.auto\nbefore = set(sys.modules)\ntry:\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('added', sorted({set(HEAVY)!r} & (set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "added []"


if __name__ == "__main__":
    units = lines_per_unit()
    for name in ["quantempo", *ROW_OF]:
        if name in units:
            print("{:12} {:3} files {:6} lines".format(name, *units[name]))
    print(f"{'all':12} {len(MODULES):3} files {sum(n for _, n in units.values()):6} lines")
