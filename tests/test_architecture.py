import ast
from pathlib import Path

import pytest

from rwkvpeft import registry
from rwkvpeft.registry import find

PACKAGE = Path(registry.__file__).parent
FLOORS = [
    ("config", "registry", "errors", "atomic", "reading"),
    ("ops",),
    ("models", "quantization", "data"),
    ("adapters",),
    ("objectives", "checkpoints"),
    ("training", "generation", "memory"),
    ("cli", "convert", "evaluate", "generate", "plan", "quantize", "teacher"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# the ground floor's own order: a name may import the names before it
GROUND = ("errors", "registry", "atomic", "reading", "config")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and isinstance(table, dict)}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def is_allowed(room, other):
    if room == other:
        return True
    if FLOOR[room] == 0:
        return FLOOR[other] == 0 and GROUND.index(other) < GROUND.index(room)
    # the rooms of the top floor are commands, which may share their parts
    return FLOOR[other] < FLOOR[room] or FLOOR[room] == FLOOR[other] == len(FLOORS) - 1


def entries(table):
    for name, place in table.items():
        if isinstance(place, dict):
            yield from entries(place)
        else:
            yield name, place


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_room_and_the_floors_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} is on no floor"
    ours = [module for module in imported_modules(path) if module.split(".")[0] == "rwkvpeft"]
    wrong = [module for module in ours if room_of(module) and not is_allowed(room, room_of(module))]
    assert not wrong


@pytest.mark.parametrize(
    ("name", "place"),
    [(f"{table}.{name}", place) for table, rows in TABLES.items() for name, place in entries(rows)],
)
def test_every_line_of_the_registry_resolves(name, place):
    try:
        assert find({name: place}, name, flag="--test") is not None
    except ModuleNotFoundError as missing:
        if missing.name.startswith("rwkvpeft"):
            raise
        pytest.skip(f"{missing.name} is not installed")


def test_the_command_line_can_be_read_without_the_heavy_libraries():
    import subprocess
    import sys

    script = (
        "import sys\n"
        "from rwkvpeft.cli.train import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'pytorch_lightning'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
