"""The house: which room may import which, and that each says what it is for."""

import ast
import pathlib

import pytest

import pixelflow_jax

# A file imports only what comes before its own room in this order, and from its own room.
ROOMS = (
    "common cascade distributed models config foreign text data sampling aot training requests "
    "evaluation pipeline"
).split()
FACE = {"config", "pipeline"}
COMMANDS = "train sample evaluate encode pack convert doctor compile_check demo".split()
PACKAGE = pathlib.Path(pixelflow_jax.__file__).parent
FOLDERS = sorted({*ROOMS} - FACE)


def imported(path: pathlib.Path) -> set[str]:
    """The rooms, commands and files of the face that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "pixelflow_jax":
                names |= {*parts[1:2]} or {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            names |= {name[1] for name in parts if name[0] == "pixelflow_jax" and name[1:]}
    return names - {"__version__"}


def test_every_file_is_at_home():
    """Catches a library among the commands, and a room that the list does not know."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files == {*COMMANDS, *FACE}
    rooms = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/*.py")}
    assert rooms - {"configs"} == {*FOLDERS}


def test_imports_go_one_way():
    """Catches a cycle between rooms, an import of a later room, and an import of a command."""
    for path in PACKAGE.rglob("*.py"):
        home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if home in ("__init__", "configs"):
            continue
        before = ROOMS if home in COMMANDS else ROOMS[: ROOMS.index(home) + (home not in FACE)]
        wrong = imported(path) - {*before}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


@pytest.mark.parametrize("room", FOLDERS)
def test_a_room_says_what_lives_there(room):
    """Catches a room whose docstring does not tell a newcomer what belongs in it and what does not."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    words = text.replace("\n", " ")
    assert words.count(". ") >= 1 and " not " in words, text


def test_sizes():
    """Catches a file or a function that has outgrown its reader."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path}: {node.name} has {length} lines"
