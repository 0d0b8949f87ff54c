"""The layers of DESIGN: storage <- tasks <- flows, and Prefect in flows only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"tasks": {"prefect", "flows", "deployments"}, "storage": {"prefect", "flows", "tasks", "deployments"}}
MODULES = [(layer, path) for layer in FORBIDDEN for path in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level packages a module imports anywhere, also inside functions or through importlib."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}:
            found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


@pytest.mark.parametrize(("layer", "path"), MODULES, ids=[str(p.relative_to(ROOT)) for _, p in MODULES])
def test_lower_layers_know_nothing_of_upper_ones(layer: str, path: Path) -> None:
    assert not imported(path) & FORBIDDEN[layer]


def test_the_check_sees_imports_wherever_they_hide(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from prefect.states import Completed\n    import importlib as i, flows.curate\n")
    assert {"prefect", "flows"} <= imported(module)
