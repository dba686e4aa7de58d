"""The layout of the code, checked on its syntax trees: who imports what, and how long functions are."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ddpm_dist.config import load_config

ROOT = Path(__file__).parent.parent
PACKAGE = "ddpm_dist"
FLOORS = {
    **dict.fromkeys(
        ("errors", "output", "command", "randomness", "backends", "config", "diffusion", "models", "parallel", "run"), 0
    ),
    **dict.fromkeys(("data", "tracking"), 1),
    "history": 2,
    **dict.fromkeys(("build", "loading"), 2),
    **dict.fromkeys(("evaluation", "exporting"), 3),
    "training": 4,
    **dict.fromkeys(("train", "sample", "evaluate", "export", "fetch", "status", "sync", "verify"), 5),
}
FREE_OF_TORCH = (
    "config",
    "errors",
    "output",
    "command",
    "train",
    "status",
    "run.preemption",
    "run.directory",
    "run.files",
    "history.attempts",
    "history.nodes",
    "history.report",
    "parallel.environment",
    "tracking",
    "tracking.journal",
    *(f"tracking.{name}" for name in ("address", "delivery", "description", "destination", "locks")),
    *(f"tracking.{name}" for name in ("process", "shipped", "shipper", "signs")),
)
FOLDERS_OF_CODE = (PACKAGE, "launch", "slurm")
MAX_LINES = 60
MAX_LINES_OF_STEP = 45
MAX_LINES_OF_FILE = 300
# These are being split. The list must become empty, and nothing may be added to it.
STILL_TOO_LONG = ("ddpm_dist/tracking/shipper.py", "launch/checks.py")


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        importer, imported: dotted names.
        line: where.
        deferred: inside a function, so not run when the importer is loaded.
        typing_only: under `if TYPE_CHECKING`.
    """

    importer: str
    imported: str
    line: int
    deferred: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module of the package; a package has its folder's name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def is_package(name: str) -> bool:
    return (ROOT / name.replace(".", "/") / "__init__.py").exists()


def imports_in(name: str, node: ast.AST, deferred: bool = False, typing_only: bool = False) -> Iterator[Import]:
    """All imports below a node."""
    targets: list[str] = []
    if isinstance(node, ast.Import):
        targets = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            anchor = name.split(".") if is_package(name) else name.split(".")[:-1]
            anchor = anchor[: len(anchor) - node.level + 1]
            base = ".".join([*anchor, *([base] if base else [])])
        # `from a import b` may import the module a.b; for modules that are not ours there is no telling.
        targets = [f"{base}.{alias.name}" for alias in node.names]
        targets = [t if not t.startswith(PACKAGE) or t in modules() else base for t in targets]
    for target in dict.fromkeys(targets):
        yield Import(name, target, node.lineno, deferred, typing_only)  # type: ignore[attr-defined]
    inside_function = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for field, value in ast.iter_fields(node):
        under_typing = isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.dump(node.test)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from imports_in(name, child, inside_function, typing_only or under_typing)


@functools.cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for name, tree in modules().items() for found in imports_in(name, tree))


def ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def wing(name: str) -> str | None:
    """`data` of ddpm_dist.data.batches; None of ddpm_dist itself, which holds the version."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The names along one circle, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph.get(name, ())):
            if circle := visit(following, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def loaded_with(name: str, *, deferred_too: bool = False) -> dict[str, list[Import]]:
    """{module of ours: its imports} of all that importing `name` runs (or, deferred_too, may ever run)."""
    found: dict[str, list[Import]] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in found or current not in modules():
            continue
        found[current] = [
            each
            for each in all_imports()
            if each.importer == current and not each.typing_only and (deferred_too or not each.deferred)
        ]
        waiting += [each.imported for each in found[current]]
        waiting += [current.rpartition(".")[0]]  # its package's __init__ runs first
    return found


def code_files(*folders: str) -> Iterator[Path]:
    """Python and shell, with or without a suffix."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".sh", ".sbatch", ""):
                yield path


def functions(*folders: str) -> Iterator[tuple[str, int]]:
    """(file:line name, number of lines) of every function, methods and inner ones included."""
    for path in code_files(*folders):
        text = path.read_text(encoding="utf-8")
        is_python = path.suffix == ".py" or "python" in text.partition("\n")[0]
        for name, line, lines in python_functions(text) if is_python else shell_functions(text):
            yield f"{path.relative_to(ROOT)}:{line} {name}", lines


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, line, number of lines) of each."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1  # type: ignore[operator]


def shell_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, line, number of lines) of each; one ends with the first line that has its brace at the margin."""
    for found in re.finditer(r"^(\w+) *\(\) *[{(](?:.*[})] *$|(?s:.*?)^[})])", text, re.MULTILINE):
        yield found[1], text.count("\n", 0, found.start()) + 1, found[0].count("\n") + 1


def test_every_module_has_a_floor() -> None:
    """A new wing or command is entered above, in the floors of the design."""
    assert {name for name in modules() if (part := wing(name)) is not None and part not in FLOORS} == set()


def test_imports_of_the_walk_are_found_where_they_are() -> None:
    """The walker itself: plain, from, relative, deferred and typing-only imports."""
    source = "\n".join(
        [
            "import a.b as c, d",
            "from e import f",
            "from ddpm_dist.run import files",
            "from .environment import x",
            "from . import probe",
            "if TYPE_CHECKING:",
            "    import g",
            "def h():",
            "    import i",
        ]
    )
    found = list(imports_in("ddpm_dist.parallel.connection", ast.parse(source)))
    assert [each.imported for each in found] == [
        *("a.b", "d", "e.f", "ddpm_dist.run.files"),
        *("ddpm_dist.parallel.environment", "ddpm_dist.parallel.probe", "g", "i"),
    ]
    assert [each.imported for each in found if each.deferred] == ["i"]
    assert [each.imported for each in found if each.typing_only] == ["g"]


def test_circles_are_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_imports_go_down_the_floors_even_inside_functions() -> None:
    climbing = [
        str(each)
        for each in all_imports()
        if ours(each.imported)
        and (high := wing(each.imported)) is not None
        and FLOORS[high] > (FLOORS[low] if (low := wing(each.importer)) is not None else -1)
    ]
    assert climbing == []


def test_commands_do_not_import_each_other() -> None:
    top = max(FLOORS.values())
    assert [
        str(each)
        for each in all_imports()
        if ours(each.imported)
        and FLOORS.get(wing(each.imported) or "") == top == FLOORS.get(wing(each.importer) or "")
        and wing(each.imported) != wing(each.importer)
    ] == []


@pytest.mark.parametrize("level", ["wings", "modules"])
def test_imports_form_no_circle_even_inside_functions(level: str) -> None:
    graph: dict[str, set[str]] = {}
    for each in all_imports():
        if ours(each.imported):
            ends = each.importer, each.imported
            start, end = (wing(name) or name for name in ends) if level == "wings" else ends
            if level == "modules" or start != end:
                graph.setdefault(start, set()).add(end)
    assert graph
    assert find_circle(graph) == []


def test_only_the_parallel_wing_touches_torch_distributed() -> None:
    """By import or as an attribute; torch.utils.data.distributed is a sampler, and knows no process group."""
    forbidden = ("torch.distributed", "torch._C._distributed_c10d", "torch.nn.parallel")
    imported = {each.importer for each in all_imports() if within(each.imported, *forbidden)}
    named = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in forbidden
    }
    users = imported | named
    assert {name for name in users if wing(name) != "parallel"} == set()
    assert "ddpm_dist.parallel.connection" in users  # the walk sees it where it is


@pytest.mark.parametrize("wing_name", ["diffusion", "models"])
def test_the_maths_knows_no_rank_no_file_and_no_config(wing_name: str) -> None:
    strangers = [
        str(each)
        for each in all_imports()
        if wing(each.importer) == wing_name and ours(each.imported) and wing(each.imported) != wing_name
    ]
    assert strangers == []


@pytest.mark.parametrize("name", FREE_OF_TORCH)
def test_module_loads_without_torch(name: str) -> None:
    """By itself or by anything of ours that it loads: signals are handled before torch takes seconds to import."""
    full = f"{PACKAGE}.{name}"
    assert full in modules()
    heavy = [
        str(each)
        for imports in loaded_with(full).values()
        for each in imports
        if within(each.imported, "torch", "torchvision", "mlflow")
    ]
    assert heavy == []


def test_every_tracking_module_is_among_those_free_of_torch() -> None:
    assert {name.removeprefix(f"{PACKAGE}.") for name in modules() if wing(name) == "tracking"} <= set(FREE_OF_TORCH)


def test_only_the_destination_imports_mlflow() -> None:
    importers = {each.importer for each in all_imports() if within(each.imported, "mlflow")}
    assert importers == {"ddpm_dist.tracking.destination"}


@pytest.mark.parametrize("command", ["train", "training.session"])
def test_the_trainer_never_loads_the_shipper(command: str) -> None:
    """Not even in a branch of a function: the shipper is a process of its own."""
    reached = loaded_with(f"{PACKAGE}.{command}", deferred_too=True)
    assert "ddpm_dist.tracking.process" in reached
    assert not {f"ddpm_dist.tracking.{name}" for name in ("destination", "shipper", "delivery")} & set(reached)


def test_the_training_step_fits_a_screen() -> None:
    lengths = {where.split()[-1]: lines for where, lines in functions(f"{PACKAGE}/training")}
    assert lengths["train_step"] <= MAX_LINES_OF_STEP


def test_functions_are_found_in_both_languages() -> None:
    assert list(python_functions("def a():\n    def b():\n        pass\n    return b\n")) == [("a", 1, 4), ("b", 2, 2)]
    shell = "a() { echo; }\n\nb() {\n  local c\n  { echo; }\n}\nd() (\n  echo\n)\n"
    assert list(shell_functions(shell)) == [("a", 1, 1), ("b", 3, 4), ("d", 7, 3)]


def test_no_function_is_longer_than_it_reads() -> None:
    lengths = dict(functions(*FOLDERS_OF_CODE))
    assert len(lengths) > 50
    assert {where: lines for where, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_has_more_than_one_idea_in_it() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in code_files(*FOLDERS_OF_CODE)
    }
    assert {"slurm/local-cluster", "slurm/requeue.sh", "launch/submit.py"} <= lengths.keys()
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES_OF_FILE}
    assert {name: lines for name, lines in too_long.items() if name not in STILL_TOO_LONG} == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = {"utils", "misc", "helpers", "common"}
    folders = (*FOLDERS_OF_CODE, "tests", "benchmarks")
    assert [str(path) for path in code_files(*folders) if path.stem in vague] == []


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs_to_check() -> None:
    assert {"quickstart.yaml", "mnist.yaml", "cifar10-ho2020.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_a_short_delta_that_loads(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25
    assert load_config(path).run.name == path.stem


def test_the_mnist_config_is_the_reference_recipe() -> None:
    assert load_config(ROOT / "configs" / "mnist.yaml") == load_config()
