"""The rules of pavi_scale/DESIGN.md on imports and sizes, read off the source with `ast`."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# Name below `pavi_scale` -> level. A package's entry holds for its modules, unless a longer entry says otherwise.
LEVELS = {
    "errors": 0, "later": 0, "counters": 0, "instructions": 0, "distances": 0, "quantile": 0, "rng": 0, "memory": 0,
    "plates": 1, "links": 1, "laws": 1, "durable": 1, "digests": 1, "events": 1, "psis": 1, "weighing": 1, "progress": 1, "pictures": 1, "device": 1,
    "ambient": 1,
    "model": 2, "cohort": 2, "encodings": 2, "flows": 2, "optimizers": 2, "lease": 2,
    "reduced": 3, "holding": 3, "noise": 3, "guide": 3, "batching": 3, "settings": 3, "server": 3,
    "ahead": 4, "elbo": 4, "moments": 4, "marginal": 4, "planning": 4, "run": 4, "ratios": 4, "computation": 4, "sampling": 4, "samples": 4, "starts": 4,
    "importing": 4, "numbering": 4, "diagnosing": 4, "scores": 4, "sites": 4, "upper": 4,
    "posterior": 4, "server.runtime": 4,
    "spec": 5, "study": 5, "structure": 5, "training": 5, "nonfinite": 5, "rows": 5, "miniature": 5, "searching": 5, "recording": 5, "writing": 5, "fitting": 5,
    "summary": 5, "calibration": 5, "reporting": 5, "config": 5, "watching": 5, "checking": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
FACADE = "pavi_scale"  # its `__init__` re-exports the public names and is imported by nothing below it

# Library -> where below `pavi_scale` it may be imported.
BORDER = {
    "dask": ("server.runtime", "cohort", "posterior"),
    "distributed": ("server.runtime", "cohort", "posterior"),
    "zarr": ("cohort", "posterior", "model.simulate"),
    "xarray": ("cohort", "posterior", "model.simulate", "calibration"),
    # Nothing that executes code when read is written to disk. The wire carries the spec and the tasks to workers, as Dask itself does with
    # all it sends: from a trusted driver, never back, and never to a file.
    "pickle": ("server.runtime.wire",), "shelve": (), "marshal": (), "joblib": (),
}  # fmt: skip
PUBLIC_MODULES = {"errors", "laws", "server.runtime", "server.simulation"}  # beside the names in `pavi_scale.__all__`
MAX_MODULE, MAX_FUNCTION = 400, 70


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file, of every module of a top-level package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module, known: set[str]) -> Iterator[tuple[str, int]]:
    """Dotted module names imported anywhere in a module, with their lines; `from p import m` names `p.m` where that is a module.

    A module that is called by its name when it is needed (`Later("p.m")`, `import_module("p.m")`) is an import, too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and node.args and isinstance(node.args[0], ast.Constant):
            called, named = node.func.id if isinstance(node.func, ast.Name) else node.func.attr, str(node.args[0].value).partition(":")[0]
            if called in ("Later", "import_module") and named in known:
                yield named, node.lineno
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node.lineno


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def level(module: str) -> int | None:
    """Level of `pavi_scale.<...>`: that of the longest entry that holds it. None if there is none."""
    parts = module.removeprefix("pavi_scale.").split(".")
    entries = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((LEVELS[entry] for entry in entries if entry in LEVELS), None)


def size_violations(tree: ast.Module, text: str, where: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > MAX_MODULE:
        yield f"{where}: {lines} lines, at most {MAX_MODULE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{where}:{node.lineno}: function {node.name} has {length} lines, at most {MAX_FUNCTION}"


def style_violations(tree: ast.Module, where: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"{where}:{node.lineno}: assert statement in the source; raise a PaviError"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    yield f"{where}:{inner.lineno}: import inside a function"


def import_violations(module: str, tree: ast.Module, known: set[str], where: str) -> Iterator[str]:
    """Level, direction and border rules for one module of pavi_scale."""
    short, own = module.removeprefix("pavi_scale."), level(module)
    if module != FACADE and own is None:
        yield f"{where}: module {module} has no level; give it one in LEVELS and in DESIGN.md"
    for target, line in imports(tree, known):
        top = target.split(".")[0]
        if target.startswith("."):
            yield f"{where}:{line}: relative import {target}"
        elif top in ("pipelines", "cluster", "tests"):
            yield f"{where}:{line}: pavi_scale imports {target}"
        elif top in BORDER and not within(short, BORDER[top]):
            yield f"{where}:{line}: {top} imported in {short}; allowed in {', '.join(BORDER[top]) or 'no module'}"
        elif target == FACADE:
            yield f"{where}:{line}: {module} imports the package's facade"
        elif top == "pavi_scale" and own is not None and (level(target) or 0) > own:
            yield f"{where}:{line}: level {own} module {module} imports level {level(target)} module {target}"


def cycle_violations(trees: dict[str, ast.Module]) -> Iterator[str]:
    known = set(trees)
    graph = {name: {target for target, _ in imports(tree, known) if target in known and target != name} for name, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " -> ".join(reversed(error.args[1]))


def public_names(facade: ast.Module) -> set[str]:
    """The strings of `__all__ = [...]`."""
    for node in facade.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def client_violations(tree: ast.Module, public: set[str], where: str) -> Iterator[str]:
    """A pipeline or cluster module uses pavi_scale by its public names alone."""
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == FACADE:
                    if len(parts) == 1 or parts[1] in PUBLIC_MODULES:
                        aliases.add((alias.asname if len(parts) == 1 else None) or parts[0])
                    else:
                        yield f"{where}:{node.lineno}: {alias.name} is not public"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == FACADE:
            if node.module == FACADE:
                private = [alias.name for alias in node.names if alias.name not in public | PUBLIC_MODULES]
            else:
                private = [] if node.module.removeprefix(FACADE + ".") in PUBLIC_MODULES else [node.module]
            yield from (f"{where}:{node.lineno}: {name} is not public" for name in private)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if node.attr not in public | PUBLIC_MODULES | {"__version__"}:
                yield f"{where}:{node.lineno}: {node.value.id}.{node.attr} is not public"


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the tree at `root`."""
    files = {package: modules(root, package) for package in ("pavi_scale", "pipelines", "cluster")}
    texts = {name: path.read_text() for found in files.values() for name, path in found.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    core = {name: trees[name] for name in files["pavi_scale"]}
    public = public_names(trees[FACADE]) if FACADE in trees else set()
    found: list[str] = []
    for package, members in files.items():
        for name, path in members.items():
            where = str(path.relative_to(root))
            found += size_violations(trees[name], texts[name], where)
            found += style_violations(trees[name], where)
            if package == "pavi_scale":
                found += import_violations(name, trees[name], set(core), where)
            else:
                found += client_violations(trees[name], public, where)
    return found + list(cycle_violations(core))


def test_the_source_keeps_the_rules(root):
    found = violations(root)
    assert not found, "\n".join(["", *found])


PLANTS = {
    "upward": ({"pavi_scale/plates.py": "from pavi_scale.fitting import fit\n"}, "level 1 module pavi_scale.plates imports level 5 module pavi_scale.fitting"),
    "upward inside a package": ({"pavi_scale/server/state.py": "from pavi_scale.server import runtime\n"}, "pavi_scale.server.state imports level 4"),
    "type-checking only": ({"pavi_scale/rng.py": "import typing\nif typing.TYPE_CHECKING:\n    import pavi_scale.plates\n"}, "level 0 module pavi_scale.rng"),
    "in a function": ({"pavi_scale/fitting.py": "def f():\n    import math\n    return math\n"}, "fitting.py:2: import inside a function"),
    "cycle": ({"pavi_scale/elbo.py": "import pavi_scale.planning\n", "pavi_scale/planning.py": "from pavi_scale import elbo\n"}, "import cycle"),
    "called by its name": ({"pavi_scale/plates.py": "import importlib\nf = importlib.import_module('pavi_scale.fitting')\n"}, "imports level 5"),
    "later": ({"pavi_scale/plates.py": "from pavi_scale.later import Later\nfit = Later('pavi_scale.fitting:fit')\n"}, "imports level 5"),
    "facade": ({"pavi_scale/fitting.py": "import pavi_scale\n"}, "imports the package's facade"),
    "relative": ({"pavi_scale/fitting.py": "from .errors import PaviError\n"}, "relative import"),
    "dask in the mathematics": ({"pavi_scale/guide/core.py": "import dask.array as da\n"}, "dask imported in guide.core"),
    "zarr in the model": ({"pavi_scale/model/template.py": "from zarr import open_group\n"}, "zarr imported in model.template"),
    "pickle": ({"pavi_scale/run.py": "import pickle\n"}, "pickle imported in run"),
    "no level": ({"pavi_scale/utils.py": "x = 1\n"}, "pavi_scale.utils has no level"),
    "pipelines from below": ({"pavi_scale/cli.py": "import pipelines.radon\n"}, "pavi_scale imports pipelines.radon"),
    "private import in a pipeline": ({"pipelines/radon.py": "from pavi_scale.guide.core import f\n"}, "pavi_scale.guide.core is not public"),
    "private name in a pipeline": ({"pipelines/radon.py": "import pavi_scale as ps\nps.guide\n"}, "ps.guide is not public"),
    "private name imported": ({"cluster/local.py": "from pavi_scale import guide\n"}, "guide is not public"),
    "assert": ({"pavi_scale/fitting.py": "assert True\n"}, "assert statement"),
    "long module": ({"pavi_scale/fitting.py": "\n" * 401}, "401 lines"),
    "long function": ({"pavi_scale/fitting.py": "def f():\n" + "    pass\n" * 70}, "function f has 71 lines"),
}
CLEAN = {
    "pavi_scale/__init__.py": "from pavi_scale.fitting import fit\n__all__ = ['fit']\n",
    "pavi_scale/errors.py": "class PaviError(Exception): ...\n",
    "pavi_scale/plates.py": "from pavi_scale.errors import PaviError\n",
    "pavi_scale/rng.py": "", "pavi_scale/elbo.py": "", "pavi_scale/planning.py": "", "pavi_scale/guide/__init__.py": "", "pavi_scale/guide/core.py": "",
    "pavi_scale/server/__init__.py": "", "pavi_scale/server/state.py": "", "pavi_scale/server/runtime.py": "import distributed\n",
    "pavi_scale/fitting.py": "from pavi_scale.plates import PaviError\nfrom pavi_scale.server import runtime\n",
    "pipelines/__init__.py": "", "pipelines/radon.py": "import pavi_scale as ps\nfrom pavi_scale.errors import PaviError\nps.fit, ps.errors\n",
}  # fmt: skip


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_clean_tree_passes(tmp_path):
    write(tmp_path, CLEAN)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_breach_is_found(tmp_path, plant):
    files, message = PLANTS[plant]
    write(tmp_path, CLEAN | files)
    assert any(message in found for found in violations(tmp_path)), violations(tmp_path)
