"""The structure of the package: who communicates, who imports whom, what is said."""

import ast
import inspect
import pathlib

import pytest
from compressor_cases import CASES, compressor

import gcjax

PACKAGE = pathlib.Path(gcjax.__file__).parent


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
del MODULES["gcjax"]  # the root
PUBLIC = {name: getattr(gcjax, name) for name in gcjax.__all__}
FACTORIES = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isfunction(thing) and thing.__module__.startswith("gcjax.compressors")
]


@pytest.mark.parametrize("name", [*FACTORIES, "power_sgd"])
def test_every_factory_documents_payload_properties_and_references(name):
    text = inspect.getdoc(PUBLIC[name])
    for part in ("Payload:", "Properties:", "References:"):
        assert part in text


def test_every_public_compressor_is_in_the_table():
    assert len(FACTORIES) >= 9
    # Its message has one length, whatever the levels are; see test_packets.py.
    others = {"fed_cvlc"}
    assert set(FACTORIES) - others == {compressor(name).name for name in CASES}


@pytest.mark.parametrize("module", [m for m in MODULES if ".compressors." in m])
def test_compressors_do_not_communicate(module):
    text = MODULES[module].read_text()
    for word in ("psum", "all_gather", "axis_name", "ppermute", "all_to_all"):
        assert word not in text


COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "psum_scatter"),
    *("ppermute", "pshuffle", "pswapaxes", "all_gather_invariant"),
}


@pytest.mark.parametrize("module", MODULES)
def test_collectives_stand_in_one_file(module):
    tree = ast.parse(MODULES[module].read_text())
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    # The second one's are over problems that are solved side by side, not over workers.
    wanted = module in ("gcjax.collectives", "gcjax.pact.cells")
    assert bool(names & COLLECTIVES) == wanted


def imports_of(module: str) -> set[str]:
    """Modules of gcjax that a module imports at its top; "gcjax" is the root."""
    found = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "gcjax"}


def test_imports_have_no_cycle():
    """Repeatedly take away what imports nothing that is left."""
    left = {module: imports_of(module) & set(MODULES) for module in MODULES}
    while left:
        free = [module for module, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle of imports among {sorted(left)}"
        for module in free:
            del left[module]


def test_no_module_below_imports_the_root():
    """Which imports them: that is how cycles start."""
    loaded = imports_of_root()
    for module in loaded:
        assert "gcjax" not in imports_of(module), module


def imports_of_root() -> set[str]:
    """Modules that `import gcjax` runs."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    queue = [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
    found = set()
    while queue:
        module = queue.pop()
        if module in MODULES and module not in found:
            found.add(module)
            queue += imports_of(module)
    return found
