"""Every snippet of README and docs is run on tiny models, word for word but for its numbers.

Above one that needs what is not here its page says `<!-- not run: WHY -->`: it is parsed alone, and
so are programs other than ours and the verbs that take minutes or a network.
"""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import quantempo
from quantempo.cli import app
from quantempo.engines import ENGINES
from quantempo.recipe import Recipe
from tests.packed import packed, saved
from tests.pipelines.transformers_2d import TRANSFORMERS
from tests.pipelines.unets import UNETS
from tests.tiny import noise

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
FENCE = re.compile(r"^(?:<!-- not run: (.+) -->\n)?```(.*)\n((?s:.*?))^```$", re.M)
COMMAND = re.compile(r"^(\.ci/run|[\w/.]*python|make|pip|quantempo|torchrun|uv) ", re.M)
VERBS = typer.main.get_command(app).commands
SLOW = ("bench", "demo", "push", "sensitivity")
# What a snippet asks for -> what is enough to see that it runs.
SMALL = (
    (r"(--(?:images|steps|batch-size)) \d+", r"\1 2"),
    (r"\b(images|steps|num_inference_steps)=\d+", r"\1=2"),
    (r"--(height|width) \d+", r"--\1 16"),
    (r"--device cuda", "--device cpu"),
    (r"--minutes \d+", "--minutes 0.01"),
    (r'"cuda"', '"cpu"'),
)
# Names of models and runs -> the tiny pipeline that is there.
MODELS = {
    "path/to/flux": lambda: TRANSFORMERS["Flux schnell"]()[0],
    "path/to/inpaint": lambda: UNETS["Stable Diffusion, inpainting"]()[0],
}
KINDS = {"path/to/model": "unconditional", "path/to/sd": "text", "path/to/dit": "dit"}


def snippets(page: Path) -> list[tuple[str, str, str]]:
    return FENCE.findall(page.read_text())


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, lines that end with a backslash joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check(words: list[str]) -> list[str] | None:
    """Assert that a command line can be meant; return its words if it is one of ours to run."""
    program, *rest = words
    if program == "torchrun":
        rest = rest[rest.index("quantempo") + 1 :]
    elif program == "make":
        assert re.search(rf"^{rest[0]}:.*##", (REPOSITORY / "Makefile").read_text(), re.M), words
        return None
    elif program in ("pip", "uv"):
        named = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {n for found in named for n in found.split(",")} <= {
            *PROJECT["optional-dependencies"]
        }
        return None
    elif program.endswith("python"):
        where = rest[1].replace(".", "/") if rest[0] == "-m" else rest[0]
        root = REPOSITORY / where
        files = [*root.parent.glob("*.py"), *root.glob("*.py")] if rest[0] == "-m" else [root]
        source = "".join(file.read_text() for file in files)
        assert all(f'"{word}"' in source for word in rest if word.startswith("--")), words
        return None
    elif program != "quantempo":
        assert (REPOSITORY / program).is_file(), words
        return None
    # Options that it does not have, or lacks, are a usage error here.
    VERBS[rest[0]].make_context(rest[0], rest[1:])
    return None if program == "torchrun" or rest[0] in SLOW else rest


def check_python(text: str) -> None:
    """Compile a snippet; assert that what it imports, and takes of quantempo, is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "quantempo":
            assert hasattr(quantempo, node.attr), node.attr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with all that snippets name: photos, prompts, a LoRA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantempo, "DEMO_MODEL", saved("unconditional"), raising=False)
    # A graph takes seconds to compile.
    monkeypatch.setattr(ENGINES.get("openvino"), "missing", lambda: "left out of this test")
    load = Recipe.load.__func__

    def short(cls: type[Recipe], source: str | Path) -> Recipe:
        return load(cls, source).override("trace", chains=2, picks=2, steps=4)

    monkeypatch.setattr(Recipe, "load", classmethod(short))
    Path("photos").mkdir()
    for n in range(4):
        image = Image.fromarray((noise(16, 16, 3, seed=n) * 40 + 128).clamp(0, 255).byte().numpy())
        image.save(f"photos/{n}.png")
    image.convert("L").save("mask.png")
    Path("prompts.txt").write_text("a b\nc d\n")
    q = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = noise(2, 32), noise(32, 2)
    save_file({f"{q}.lora_A.weight": down, f"{q}.lora_B.weight": up}, "style.safetensors")
    return tmp_path


def furnish(folder: Path, page: str) -> None:
    """Put the models there that a page names, and the runs that it does not make."""
    for name in re.findall(r"path/to/\w+|black-forest-labs/[\w.-]+", page):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name in KINDS:
                (folder / name).symlink_to(saved(KINDS[name]))
            else:
                with torch.random.fork_rng(devices=[]):
                    MODELS.get(name, MODELS["path/to/flux"])().save_pretrained(folder / name)
    for name in set(re.findall(r"\bruns/\w+", page)):
        made = re.search(rf"(quantize|trace)\b.*{name}\b", page.replace("\\\n", ""))
        if not made and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(packed("text").run)
    if not (folder / "packed").exists():
        (folder / "packed").symlink_to(packed("text").folder)


WITH = [page for page in PAGES if any(kind for _, kind, _ in snippets(page))]


@pytest.mark.parametrize("page", WITH, ids=lambda page: page.stem)
def test_snippets(page: Path, folder: Path, cli: Any) -> None:
    furnish(folder, "\n".join(text for why, _, text in snippets(page) if not why))
    names: dict[str, Any] = {}
    for why, kind, text in snippets(page):
        if kind == "toml" and not why:
            (folder / text.split()[1]).write_text(text)
    for why, kind, text in snippets(page):
        if kind == "python":
            check_python(text)
        for old, new in SMALL:
            text = re.sub(old, new, text)
        if kind == "python" and not why:
            exec(compile(text, f"{page.name}: {text[:60]}", "exec"), names)
        for words in commands(text) if kind == "bash" else ():
            ours = check(words)
            if ours and not why:
                done = cli(*ours)
                assert done.code == 0, (words, done.err)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_where_they_are_tested(page: Path) -> None:
    for _, kind, text in snippets(page):
        assert kind in ("", "python", "bash", "toml", "json", "text", "diff"), kind
        assert kind or not COMMAND.search(text), f"a command in a block that is no bash: {text}"
    # The log tells what there was.
    text = "" if page.stem == "LOG" else page.read_text()
    for words in map(shlex.split, re.findall(r"`quantempo ([^`\n]+)`", text)):
        verb = next((word for word in words if word in VERBS), None)
        known = {name for option in VERBS[verb].params for name in option.opts} if verb else ()
        assert not verb or {w for w in words if w.startswith("--")} <= {*known, "--help"}, words


def test_every_public_name_is_documented() -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    for name in set(quantempo.__all__) - {"__version__"}:
        assert re.search(rf"^::: quantempo\.[\w.]+\.{name}$|`quantempo\.{name}`", page, re.M), name
