"""The house: which room may import which."""

import ast
import pathlib

import pixelflow_jax

# From the ground floor up; a room imports only what stands before it.
ROOMS = (
    "errors numerics cascade images packing hardware sharding files locks weights arrays rollcall hosts "
    "models text config_keys config official flow data sampling training cli layouts conditions request "
    "pipeline convert evaluation train sample sweep evaluate pack encode hlo roofline compile_check "
    "doctor demo"
).split()
PACKAGE = pathlib.Path(pixelflow_jax.__file__).parent


def test_imports_go_one_way():
    """Catches a cycle, an import of an upper room, and a room that the list does not know."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ROOMS, f"{path} is in no room of the list"
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pixelflow_jax"):
                parts = node.module.split(".")
                names = parts[1:2] or [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("pixelflow_jax.")]
            for name in set(names) - {"__version__"}:
                own = name == room and path.parent != PACKAGE
                assert own or ROOMS.index(name) < ROOMS.index(room), f"{path} imports {name}"
