"""The floors of docs/design.md: imports go down only, Flax stays in the models, nothing is called utils."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    *({"plan"}, {"train"}, {"tasks"}, {"app", "evaluate"}, {"loading"}, {"pipelines"}, {"convert"}, {"checkpoint"}),
    *(
        {"report"},
        {"logbook", "meter", "interrupt", "runtime", "command", "processes"},
        {"data"},
        {"tokens"},
        {"config"},
    ),
    *(
        {"lora", "quant", "sharding", "optim"},
        {"diffusion"},
        {"models"},
        {"layers"},
        {"attention"},
        {"weights", "gptq", "pallas"},
    ),
    *(
        {"qtensor"},
        {"convolution", "rows", "tree"},
        {"product", "prologue", "sums"},
        {"npz", "paths", "primal", "target", "version"},
    ),
)
"""Top first. A module imports from floors below its own, a package also from itself."""
LEVEL = {name: len(FLOORS) - i for i, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted(p for p in (ROOT / "jdiff").rglob("*.py") if p != ROOT / "jdiff" / "__init__.py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything a file imports, inside functions too; `from a import b` is `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path: Path) -> str:
    """The module or package of jdiff that a file belongs to."""
    return path.relative_to(ROOT / "jdiff").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = module_of(path)
    assert own in LEVEL, f"{own} has no floor: give it one in docs/design.md and here"
    for name in imported(ast.parse(path.read_text())):
        first, *rest = name.split(".")
        assert first not in ("tools", "configs", "launch"), f"{own} imports {name}, a script"
        if first == "jdiff" and rest:
            assert rest[0] in LEVEL, f"{own} imports {name}, which has no floor"
            assert rest[0] == own or LEVEL[rest[0]] < LEVEL[own], f"{own} imports {name}, which is not below it"
        if name.startswith("flax"):
            assert own in ("layers", "models"), f"{own} imports {name}: only layers and models know Flax"


def test_configs_know_only_the_config():
    for path in (ROOT / "configs").glob("*.py"):
        names = {n for n in imported(ast.parse(path.read_text())) if n.startswith("jdiff")}
        assert all(n.startswith("jdiff.config") for n in names), f"{path.name} imports {names}"


def test_nothing_is_called_utils():
    folders = [ROOT / name for name in ("jdiff", "configs", "tools", "tests")]
    assert not [path for folder in folders for path in folder.rglob("*util*.py")]
