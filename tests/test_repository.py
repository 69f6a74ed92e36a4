"""What the repository promises around the code: paths in texts, pins, extras, the bundled model."""

import hashlib
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
MODEL = REPOSITORY / "src" / "quantempo" / "data" / "ddpm-cifar10-9m"
TEXTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), MODEL / "README.md"]
)

# Files a run, a save or a tool writes: named in texts, not in the repository.
GENERATED = re.compile(
    r"^(\.venv|runs|packed|samples|trace|blocks|unet|scheduler|build|dist)/|"
    r"^(manifest|metrics|model|layers|trace|config|sensitivity|model_index)\.json$|"
    r"^(stats|scales|rounding)\.safetensors$|^report\.html$|^sensitivity\.svg$"
)


def pins() -> dict[str, str]:
    """Return normalised name -> version of `constraints.txt`."""
    lines = (REPOSITORY / "constraints.txt").read_text().split("\n")
    rows = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in rows}


def named_paths(text: str) -> set[str]:
    """Return what a text names like a path: code spans with a slash or an ending, and links."""
    spans = re.findall(r"`([\w.+-]*[\w+-](?:/[\w.+-]+)*/?)`", text)
    ending = r"\.(?:md|py|toml|txt|cff|json|html|safetensors|c|cpp|h)$"
    paths = {span for span in spans if "/" in span or re.search(ending, span)}
    links = re.findall(r"\]\(([^)#\s]+)\)", text)
    return paths | {link for link in links if "://" not in link}


def tracked_files() -> list[Path]:
    """Return the files of the repository that git knows or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [REPOSITORY / name for name in done.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def closure(extras: set[str]) -> dict[str, str]:
    """Return name -> installed version of everything quantempo[extras] brings in."""
    found: dict[str, str] = {}
    queue = [("quantempo", frozenset(extras))]
    seen = set(queue)
    while queue:
        name, wanted = queue.pop()
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        if name != "quantempo":
            found[canonicalize_name(name)] = dist.version.partition("+")[0]
        for requirement in map(Requirement, dist.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in wanted | {""}):
                item = (requirement.name, frozenset(requirement.extras))
                if item not in seen:
                    seen.add(item)
                    queue.append(item)
    return found


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_paths_named_in_texts_exist(text: Path) -> None:
    places = [text.parent, REPOSITORY, REPOSITORY / "src" / "quantempo"]
    missing = [
        path
        for path in sorted(named_paths(text.read_text()))
        if not GENERATED.search(path) and not any((place / path).exists() for place in places)
    ]
    assert not missing


def test_path_finder_finds() -> None:
    text = "`src/x.py` [a](docs/y.md) [b](https://z.w/v) `setup.py` `a.b()` `folder/` `x_t` `make`"
    assert named_paths(text) == {"src/x.py", "docs/y.md", "setup.py", "folder/"}


def test_pins_are_exact_and_for_any_index() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "name==version only"
    # pip refuses a name with two versions, in a clean environment alone.
    assert len(pins()) == len(lines)


def test_pins_satisfy_the_lower_bounds() -> None:
    project = PROJECT["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    for requirement in map(Requirement, chain(project["dependencies"], extras)):
        pinned = pins().get(canonicalize_name(requirement.name))
        if pinned is not None:
            assert requirement.specifier.contains(pinned), requirement
    for requirement in map(Requirement, PROJECT["tool"]["uv"]["constraint-dependencies"]):
        assert str(requirement.specifier) == f"=={pins()[canonicalize_name(requirement.name)]}"


def test_every_installed_dependency_is_pinned() -> None:
    installed, pinned = closure({"openvino", "onnx", "eval", "report", "dev", "docs"}), pins()
    other = {name for name in installed.keys() & pinned if installed[name] != pinned[name]}
    if other:
        pytest.skip(f"not installed from constraints.txt: {sorted(other)[:5]}")
    # These come with the interpreter's venv, in the version that suits it.
    assert not installed.keys() - pinned.keys() - {"pip", "setuptools", "wheel"}


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (REPOSITORY / "CHANGELOG.md").read_text()
    assert distribution("quantempo").version == version


def test_bundled_model_is_the_one_its_card_describes() -> None:
    card = (MODEL / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    weights = MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    tensors = load_file(weights).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    count = sum(tensor.numel() for tensor in tensors)
    assert f"{count:,}" in card


def test_texts_of_the_repository_name_no_machine() -> None:
    # In pieces, so that this file does not find itself.
    home = re.compile("/" + r"(?:home|root|Users)/\w|" + "file:" + "///|localhost" + ":")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}: {match.group()}" for match in home.finditer(text)]
    assert not found


def test_wheel_carries_data_beside_the_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("quantempo/")}
    source = REPOSITORY / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "quantempo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert names == expected
    kinds = {".py", ".toml", ".safetensors", ".json", ".j2"}
    assert kinds <= {Path(name).suffix for name in names} and "quantempo/py.typed" in names


@pytest.mark.parametrize("script", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=str)
def test_scripts_of_figures_start(script: Path) -> None:
    """A module that was renamed is missed nowhere else: they are run once in months."""
    assert callable(runpy.run_path(str(script))["main"])


def test_a_warning_of_the_site_is_an_error(tmp_path: Path) -> None:
    """By the words of `make docs`: with --quiet mkdocs counts no warnings."""
    line = next(
        x for x in (REPOSITORY / "Makefile").read_text().splitlines() if "mkdocs build" in x
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\n")
    mkdocs = f"{sys.executable} -m mkdocs"
    command = line.strip().removeprefix("@").replace("$(BIN)/mkdocs", mkdocs)
    for text, code in (("# a\n", 0), ("# a\n[b](c.md)\n", 1)):
        (tmp_path / "docs/index.md").write_text(text)
        shell = ["bash", "-euo", "pipefail", "-c", command]
        assert subprocess.run(shell, cwd=tmp_path, capture_output=True).returncode == code
