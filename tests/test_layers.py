"""The house: who imports whom, where private parts are touched, what is public."""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lrvd_pyro

ROOT = Path(__file__).parents[1]
LAYERS = [
    ("_numbers",),
    ("_version", "_compat", "autocast", "batches", "threads"),
    ("rank_space", "distributions", "likelihoods"),
    ("inference",),
    ("optim",),
    ("priors",),
    ("models",),
    ("guides", "predictive"),
    ("selection", "testing"),
    ("gauge", "storage", "diagnostics"),
    ("training",),
    ("__init__",),
]
FLOOR = {part: floor for floor, parts in enumerate(LAYERS) for part in parts}
KNOWS_NOT = {
    "rank_space": {"pyro"},
    "inference": {"peft", "transformers"},
    "distributions": {"peft", "transformers"},
    "likelihoods": {"peft", "transformers"},
}


def sources() -> Iterator[tuple[str, str]]:
    """Every file of the package: its dotted name below ``lrvd_pyro``, and its text."""
    for folder in (ROOT / "lrvd_pyro", ROOT / "models", ROOT / "guides"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == "lrvd_pyro" else parts
            if folder.name != "lrvd_pyro" or parts[0] not in ("models", "guides"):
                yield ".".join(parts), path.read_text()


BY_NAME = {"importlib.import_module", "import_module", "__import__"}


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, in functions and type checks too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            for alias in node.names:
                yield node.lineno, f"{dots}{node.module or ''}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def breaches(module: str, text: str) -> list[str]:
    """The imports of a module that its place in the house forbids."""
    part = module.partition(".")[0]
    found = []
    for line, name in imports(text):
        library, _, rest = name.partition(".")
        where = f"{module}:{line} imports {name}"
        if not library:
            found.append(f"{where}, which is relative: write lrvd_pyro")
        behind = rest.removeprefix("_compat.").partition(".")[0]
        known = {library, behind} if rest.startswith("_compat.") else {library}
        for each in sorted(known & KNOWS_NOT.get(part, set())):
            found.append(f"{where}, and {part} does not know {each}")
        if library in ("models", "guides", "importlib", "operator"):
            found.append(f"{where}, which hides a module or a name: write lrvd_pyro")
        if library != "lrvd_pyro":
            continue
        other = rest.partition(".")[0]
        if other not in FLOOR:
            found.append(f"{where}, which is none of {sorted(FLOOR)}")
        elif other != part and FLOOR[other] >= FLOOR[part]:
            found.append(f"{where}, which is not below {part}")
    return found


def test_every_import_goes_down() -> None:
    found = [each for name, text in sources() for each in breaches(name, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("inference.elbo", "import peft", "inference does not know peft"),
        ("rank_space.space", "from pyro import poutine", "does not know pyro"),
        ("guides.auto", "from lrvd_pyro.predictive import predict", "not below guides"),
        ("models.base", "from lrvd_pyro import predictive", "not below models"),
        ("models.base", "importlib.import_module('lrvd_pyro.gauge')", "not below mod"),
        ("rank_space.space", "from lrvd_pyro._compat.pyro import x", "not know pyro"),
        ("inference.kl", "from lrvd_pyro._compat import peft", "does not know peft"),
        ("optim", "from lrvd_pyro.nothing import x", "which is none of"),
        ("optim", "from guides import RankGuide", "which hides a module"),
        ("optim", "import importlib as i", "which hides a module"),
        (
            "optim.groups",
            "from . import x",
            "optim.groups:1 imports ..x, which is rela",
        ),
        (
            "priors.base",
            "def f():\n    if TYPE_CHECKING:\n        from lrvd_pyro.models import G",
            "priors.base:3 imports lrvd_pyro.models.G, which is not below priors",
        ),
    ],
)
def test_a_breach_is_found_with_its_line(module: str, line: str, message: str) -> None:
    (found,) = breaches(module, line)
    assert message in found


def test_modules_of_one_package_form_no_circle() -> None:
    names = {name.removesuffix(".__init__") for name, _ in sources()}
    below: dict[str, set[str]] = {}
    for name, text in sources():
        mine = name.removesuffix(".__init__")
        targets = (n.removeprefix("lrvd_pyro.") for _, n in imports(text))
        found = {t if t in names else t.rpartition(".")[0] for t in targets}
        below[mine] = (found & names) - {mine}
    while below:
        leaves = {name for name, needs in below.items() if not needs & below.keys()}
        assert leaves, f"a circle among {sorted(below)}"
        below = {n: needs - leaves for n, needs in below.items() if n not in leaves}


def private_touches(text: str) -> Iterator[str]:
    """Lines that reach into an object's private parts, or import private names."""
    for node in ast.walk(ast.parse(text)):
        here = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = ast.unparse(node.value)
            mine = owner in ("self", "cls", "super()")
            if not mine and (node.attr == "__dict__" or not node.attr.endswith("__")):
                yield f"{here}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            for name in [module, *(f"{module}.{a.name}" for a in node.names)]:
                parts = [p for p in name.split(".") if p not in ("", "__future__")]
                if parts[:1] != ["lrvd_pyro"] and any(p[0] == "_" for p in parts):
                    yield f"{here}: {ast.unparse(node)}"
                    break
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = node.slice.value
            if isinstance(key, str) and key[:1] == "_" and "vars(" in ast.unparse(node):
                yield f"{here}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BY_TEXT:
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            names = [n for t in texts if isinstance(t, str) for n in t.split(".")]
            if any(n.startswith("_") and not n.endswith("__") for n in names):
                yield f"{here}: {ast.unparse(node)}"


BY_TEXT = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller"}
BY_TEXT |= {"operator.attrgetter", "object.__getattribute__", "object.__setattr__"}
BY_TEXT |= {"importlib.import_module", "import_module", "__import__"}

ALLOWED = {
    # a copy of the space itself, and a NamedTuple's documented method
    "rank_space.space": "space._renumber",
    "diagnostics.calibration": "interval._asdict",
    # torch's own pattern for the expand of a distribution
    "distributions.log_uniform": "new._validate_args",
    "distributions.truncated": "new._validate_args",
    # an instance's own forward, apart from its class's, as accelerate sets it
    "predictive.prefix": "module.__dict__",
}


def test_private_parts_of_other_libraries_are_touched_in_compat_alone() -> None:
    found = [
        f"{name}, {line}"
        for name, text in sources()
        for line in private_touches(text)
        if not name.startswith("_compat.")
        and not line.endswith(ALLOWED.get(name, "nothing"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "x = net._modules",
        "from torch import _C",
        "import torch._C",
        "import torch._C as C",
        "from torch._C import x",
        "getattr(net, '_orig_mod', None)",
        "setattr(net, '_x', 1)",
        "attrgetter('a._b')",
        "importlib.import_module('torch._C')",
        "__import__('torch._C')",
        "net.__dict__['_x']",
        "vars(net)['_x']",
    ],
)
def test_a_private_touch_is_found_in_every_form(line: str) -> None:
    assert len([*private_touches(line)]) == 1


@pytest.mark.parametrize("line", ["self._x", "f.__name__", "getattr(f, '__name__')"])
def test_ones_own_parts_are_no_private_touch(line: str) -> None:
    assert not list(private_touches(line))


def packages() -> Iterator[ModuleType]:
    yield lrvd_pyro
    for info in pkgutil.walk_packages(lrvd_pyro.__path__, "lrvd_pyro."):
        yield importlib.import_module(info.name)


def test_no_name_shadows_a_module() -> None:
    for package in packages():
        for info in pkgutil.iter_modules(getattr(package, "__path__", ())):
            found = getattr(package, info.name)
            assert isinstance(found, ModuleType), f"{package.__name__}.{info.name}"
            assert found.__name__ == f"{package.__name__}.{info.name}"


def test_every_package_says_what_is_public_in_order() -> None:
    for package in packages():
        if not hasattr(package, "__path__"):
            continue
        names = package.__all__
        assert [*names] == sorted(names), package.__name__
        assert all(hasattr(package, name) for name in names), package.__name__


def test_dir_shows_what_is_public_and_nothing_else() -> None:
    assert dir(lrvd_pyro) == sorted(lrvd_pyro.__all__)


def test_no_file_is_above_300_lines_and_the_readme_is_a_page() -> None:
    folders = ("lrvd_pyro", "models", "guides", "examples")
    code = [path for each in folders for path in (ROOT / each).rglob("*.py")]
    assert len(code) > 60
    assert not [p for p in code if len(p.read_text().splitlines()) > 300]
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def defined(text: str) -> tuple[set[str], list[str]]:
    """Names that a module defines without an underscore; and its ``__all__``."""
    names, public = set(), []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (t for t in targets if isinstance(t, ast.Name)):
                if target.id == "__all__":
                    assert node.value is not None
                    public = ast.literal_eval(node.value)
                else:
                    names.add(target.id)
    return {name for name in names if not name.startswith("_")}, public


def uses(text: str, modules: set[str]) -> Iterator[tuple[str, str]]:
    """The module and the name of whatever of the library a file uses."""
    aliases: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("lrvd_pyro").lstrip(".")
            for alias in node.names:
                yield module, alias.name
                inner = f"{module}.{alias.name}".lstrip(".")
                if inner in modules:
                    aliases[alias.asname or alias.name] = inner
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                yield aliases[node.value.id], node.attr


def test_every_module_names_what_other_files_use_and_no_more() -> None:
    texts = dict(sources())
    others = [
        p.read_text() for d in ("tests", "examples") for p in (ROOT / d).rglob("*.py")
    ]
    used: dict[str, set[str]] = {}
    for text in [*texts.values(), *others]:
        for module, name in uses(text, set(texts)):
            used.setdefault(module, set()).add(name)
    for name, text in texts.items():
        if name.endswith("__init__"):
            continue
        names, public = defined(text)
        assert public == sorted(names | set(public)), f"{name}.__all__ is not {names}"
        unused = names - used.get(name, set())
        assert not unused, f"no other file uses {unused} of {name}: give underscores"


def parameters() -> Iterator[tuple[str, str]]:
    """Every parameter of the library but self, and its annotation."""
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                own = node.args
                variadic = [own.vararg, own.kwarg]
                named = [*own.posonlyargs, *own.args, *own.kwonlyargs]
                for arg in [*named, *filter(None, variadic)]:
                    if arg.arg not in ("self", "cls"):
                        note = "" if arg.annotation is None else arg.annotation
                        yield f"{name}.{node.name}", note and ast.unparse(note)


def test_few_parameters_are_of_any_type() -> None:
    notes = [*parameters()]
    bare = [where for where, note in notes if note in ("Any", "")]
    assert len(bare) < 0.02 * len(notes), f"{len(bare)} of {len(notes)}: {bare}"
