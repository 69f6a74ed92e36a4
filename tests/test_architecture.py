"""The layers and walls of the package, read from its imports; limits on files and functions.

Run as a script it prints the lines of every package: `python tests/test_architecture.py`.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantempo
from quantempo.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "quantempo"

# From the top down: a unit imports only units of the rows below its own. With one line a unit, from
# which the diagram in CONTRIBUTING.md is generated (`python tests/test_architecture.py --write`).
ROWS: tuple[dict[str, str], ...] = (
    {"cli": "parse, call one library function, print"},
    {
        "bench": "time networks and kernels",
        "export": "formats of other programs",
        "mixed_precision": "bits by layer",
    },
    {"pipeline": "the main line, its stages and its cache"},
    {"rounding": "fit integer weights", "checkpoint": "write and load packed folders"},
    {
        "calibration": "run data through a model",
        "engines": "execute integer layers",
        "evaluation": "score images",
    },
    {"quantized": "quantized layers, the step clock, replacing layers"},
    {"scales": "choose scales"},
    {"models": "know architectures", "report": "read a run folder, draw one page"},
    {
        "kernels": "operators on plain tensors",
        "recipe": "settings as TOML",
        "run_folder": "artefacts, whole or not at all",
    },
    {"core": "formats, packing, tensors that lie in files"},
    {"registry": "names of interchangeable parts"},
    {"errors": "one type for a user's mistake, the log"},
)
ROW_OF = {unit: row for row, units in enumerate(ROWS) for unit in units}

# What a unit may see of the project, where that is less than the rows below it.
ONLY = {
    "kernels": {"kernels"},
    "report": {"report", "errors", "run_folder", "registry"},
}
NEVER = {"evaluation": {"quantized", "models", "calibration", "engines"}}
THIRD_PARTY_ONLY = {"kernels": {"torch", "numpy", "triton"}}
# Packages that do not know each other; only the `__init__` of `engines` imports one of its own.
ENGINES = ("engines.onednn", "engines.cuda", "engines.openvino")
APART = (*ENGINES, "kernels.cpu", "kernels.gpu")
DIFFUSERS_AT = ("models/", "checkpoint/diffusers_plugin.py")

# Lines of Python; a ceiling falls with what it counts and rises only with a capability.
BUDGETS = {"src": 29_051, "studies": 4_852, "tests": 28_905}
MAX_ROOT = 6
MAX_FAN_OUT = {"pipeline": 12}
MAX_FILE = 400
MAX_FUNCTION = 60
MAX_KERNEL_FUNCTION = 120
HEAVY = ("jinja2", "matplotlib", "nncf", "onnx", "openvino", "torchmetrics", "transformers")

MODULES = sorted(PACKAGE.rglob("*.py"))
STUDIES = sorted((REPOSITORY / "studies").rglob("*.py"))
SOURCES = MODULES + STUDIES + sorted((REPOSITORY / "tests").rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Parse a file, once."""
    return ast.parse(path.read_text())


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
    if root == "studies":
        return "the package does not know the studies"
    if root != "quantempo":
        if root == "diffusers" and not where.startswith(DIFFUSERS_AT):
            return f"only {' and '.join(DIFFUSERS_AT)} import diffusers"
        allowed = THIRD_PARTY_ONLY.get(unit)
        if allowed is not None and root not in allowed | set(sys.stdlib_module_names):
            return f"{unit} imports only {sorted(allowed)} and the standard library"
        return None
    target = rest.partition(".")[0]
    package = ".".join(where.split("/")[:2]).removesuffix(".py")
    other = next((apart for apart in APART if f"{rest}.".startswith(f"{apart}.")), None)
    inside = package.partition(".")[0] == target and package != f"{target}.__init__"
    if inside and other not in (None, package) and (package in APART or other in ENGINES):
        return f"{package} must not import {other}: they do not know each other"
    # A unit without a row is the business of `test_every_unit_has_a_row`.
    if target == unit or target == "__version__" or unit not in ROW_OF:
        return None
    if target not in ROW_OF:
        return f"'{target}' is no unit of the package; import from the module that defines it"
    if target not in ONLY.get(unit, ROW_OF) or target in NEVER.get(unit, ()):
        return f"{unit} must not see {target}"
    if ROW_OF[target] <= ROW_OF[unit]:
        return f"{unit} must not import {target}: it stands in a row above or beside"
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


def test_every_unit_has_a_row() -> None:
    unknown = {unit_of(path) for path in MODULES} - set(ROW_OF) - {""}
    assert not unknown, f"give {sorted(unknown)} a row in ROWS"


def test_imports_point_downwards_and_respect_the_walls() -> None:
    broken = []
    for path in MODULES:
        where = path.relative_to(PACKAGE).as_posix()
        for line, name in imported(path, tree_of(path)):
            reason = refusal(unit_of(path), where, name)
            if reason:
                broken.append(f"{where}:{line}: {name}: {reason}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("core/formats.py", "quantempo.models.layers"),
        ("core/formats.py", "quantempo.run_folder"),
        ("models/layers.py", "quantempo.scales.activation"),
        ("calibration/trace.py", "quantempo.engines.base"),
        ("kernels/layout.py", "quantempo.core.formats"),
        ("kernels/layout.py", "diffusers"),
        ("kernels/layout.py", "scipy.stats"),
        ("evaluation/fidelity.py", "quantempo.quantized"),
        ("evaluation/fidelity.py", "quantempo.models.layers"),
        ("report/plots.py", "quantempo.core"),
        ("pipeline/stages.py", "studies.ptq4dm"),
        ("engines/base.py", "diffusers.models"),
        ("checkpoint/write.py", "diffusers"),
        ("pipeline/stages.py", "quantempo.cli.run_demo"),
        ("pipeline/stages.py", "quantempo.Recipe"),
        ("engines/cuda/layer.py", "quantempo.engines.onednn.layer"),
        ("engines/openvino/engine.py", "quantempo.engines.cuda"),
        ("engines/layerwise.py", "quantempo.engines.onednn"),
        ("kernels/cpu/onednn.py", "quantempo.kernels.gpu.qgemm"),
        ("kernels/gpu/qgemm.py", "quantempo.kernels.cpu.onednn"),
    ],
)
def test_the_rule_refuses(where: str, name: str) -> None:
    assert refusal(unit_of(PACKAGE / where), where, name)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("core/formats.py", "quantempo.errors"),
        ("kernels/layout.py", "torch.nn.functional"),
        ("report/plots.py", "quantempo.run_folder"),
        ("models/layers.py", "diffusers"),
        ("checkpoint/diffusers_plugin.py", "diffusers.quantizers"),
        ("cli/run_demo.py", "quantempo.pipeline.stages"),
        ("cli/__init__.py", "quantempo.bench.run"),
        ("__init__.py", "quantempo.pipeline.stages"),
        ("engines/__init__.py", "quantempo.engines.onednn"),
        ("engines/cuda/layer.py", "quantempo.engines.cuda.constants"),
        ("engines/cuda/layer.py", "quantempo.engines.simulated"),
        ("kernels/ops.py", "quantempo.kernels.gpu.qgemm"),
        ("kernels/cpu/onednn.py", "quantempo.kernels.layout"),
    ],
)
def test_the_rule_allows(where: str, name: str) -> None:
    assert refusal(unit_of(PACKAGE / where), where, name) is None


def test_imports_are_found_wherever_they_stand() -> None:
    code = (
        "import a.b\n"
        "def f():\n"
        "    from quantempo import core\n"
        "    from . import formats\n"
        "    from ..scales.activation import s\n"
        "    import_module('quantempo.checkpoint')\n"
    )
    names = [name for _, name in imported(PACKAGE / "core" / "x.py", ast.parse(code))]
    inside = ["core", "core.formats", "scales.activation.s", "checkpoint"]
    assert names == ["a.b", *(f"quantempo.{name}" for name in inside)]


def test_files_are_short() -> None:
    long = {str(path.relative_to(REPOSITORY)): path.read_text().count("\n") for path in SOURCES}
    long = {name: lines for name, lines in long.items() if lines > MAX_FILE}
    assert not long, f"over {MAX_FILE} lines: {long}"


def test_state_of_instances_is_set_in_one_module() -> None:
    tricks = re.compile(
        r"object\.__setattr__\(|__dict__(\[|\.pop)|\._(buffers|modules)\[|\.forward = "
    )
    users = {p.relative_to(PACKAGE).as_posix() for p in MODULES if tricks.search(p.read_text())}
    assert users == {"core/instance.py"}


def test_functions_are_short() -> None:
    long = []
    for path in SOURCES:
        kernel = path.is_relative_to(PACKAGE) and unit_of(path) == "kernels"
        limit = MAX_KERNEL_FUNCTION if kernel else MAX_FUNCTION
        for name, lines in functions(tree_of(path)):
            if lines > limit:
                long.append(f"{path.relative_to(REPOSITORY)}:{name}: {lines} lines, limit {limit}")
    assert not long, "\n".join(long)


def test_modules_say_what_they_are() -> None:
    broken = []
    for path in MODULES + STUDIES:
        where, tree = path.relative_to(REPOSITORY).as_posix(), tree_of(path)
        text = ast.get_docstring(tree) or ""
        if len(text) < 10:
            broken.append(f"{where}: no module docstring worth the name")
        targets = [
            target
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        ]
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            broken.append(f"{where}: no __all__")
    assert not broken, "\n".join(broken)


def test_asserts_narrow_types_alone() -> None:
    """`python -O` leaves them out: none does anything or refuses what comes from outside."""
    broken = []
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assert):
                text = ast.unparse(node.test)
                if not re.fullmatch(r"[\w.]+ is not None|isinstance\([\w.]+, [\w.]+\)", text):
                    broken.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {text}")
    assert not broken, "\n".join(broken)


def test_heavy_packages_are_imported_late() -> None:
    # diffusers imports transformers by itself, so what counts is what we add to it.
    script = (
        "import sys, diffusers.quantizers.auto\nbefore = set(sys.modules)\n"
        "import quantempo\nfrom quantempo.cli import main\nsys.argv = ['quantempo', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('added', sorted({set(HEAVY)!r} & (set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "added []"


@pytest.mark.parametrize("part", BUDGETS)
def test_budgets_of_lines(part: str) -> None:
    lines = sum(text.read_text().count("\n") for text in (REPOSITORY / part).rglob("*.py"))
    assert lines <= BUDGETS[part], f"{part} has {lines} lines; its budget is {BUDGETS[part]}"


def test_the_root_is_small_and_modules_of_the_main_line_know_few_others() -> None:
    assert len([path for path in MODULES if path.parent == PACKAGE]) <= MAX_ROOT
    for path in MODULES:
        names = {name for _, name in imported(path, tree_of(path))}
        places = {PACKAGE.joinpath(*name.split(".")[1:]) for name in names if "quantempo." in name}
        # "from m import name" counts as m, "from package import m" as m.
        known = {place if place.with_suffix(".py").exists() else place.parent for place in places}
        limit = MAX_FAN_OUT.get(unit_of(path), len(known))
        assert len(known) <= limit, f"{path.name} imports {len(known)} modules, limit {limit}"


def words_of(path: Path) -> set[str]:
    """Return every name that a module reads, calls or imports."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found


def test_public_names_are_used() -> None:
    # What a registry or the command line takes by a decorator is used by its name as a string.
    used = set().union(*map(words_of, MODULES), quantempo.__all__)
    unused = {
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in MODULES
        for node in tree_of(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not any(isinstance(how, ast.Call) for how in node.decorator_list)
        if node.name not in used
    }
    assert not unused


def test_every_setting_of_a_recipe_is_read() -> None:
    """By `.NAME`, outside of the recipe itself."""
    modules = [tree_of(path) for path in MODULES if unit_of(path) != "recipe"]
    nodes = [node for tree in modules for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for group, settings in Recipe().to_dict().items():
        names = {group, *(settings if isinstance(settings, dict) else ())}
        assert names <= read, f"nothing reads {sorted(names - read)} of {group}"


def test_scheduler_step_is_wrapped_in_one_place() -> None:
    found = set()
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            setters = name in ("patch.object", "setattr")
            named = [ast.unparse(given) for given in node.args] if setters else []
            targets = [to for to in targets if isinstance(to, ast.Attribute) and to.attr == "step"]
            if targets or "'step'" in named:
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"models/call.py"}


def diagram() -> str:
    """Return the rows as text, one line a unit."""
    lines = []
    for row in ROWS:
        lines += [f"{unit:16} {text}" for unit, text in row.items()] + [""]
    return "\n".join(lines[:-1])


CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
DIAGRAM = re.compile(r"(?<=<!-- rows -->\n```\n).*?(?=\n```)", re.S)


def test_the_diagram_of_contributing_is_the_rows() -> None:
    found = DIAGRAM.search(CONTRIBUTING.read_text())
    assert found and found[0] == diagram(), "run python tests/test_architecture.py --write"


if __name__ == "__main__":
    if "--write" in sys.argv:
        CONTRIBUTING.write_text(DIAGRAM.sub(lambda _: diagram(), CONTRIBUTING.read_text()))
    units = lines_per_unit()
    for name in ["quantempo", *ROW_OF]:
        if name in units:
            print("{:16} {:3} files {:6} lines".format(name, *units[name]))
    print(f"{'all':16} {len(MODULES):3} files {sum(n for _, n in units.values()):6} lines")
