"""Docstrings of public names: a summary, every argument, shapes where arrays go in or out, and the
errors that are raised."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest
from flax import nnx

import ig_jax

ROOT = pathlib.Path(ig_jax.__file__).parent

# "(B, H, W, C)", "(N,)", "()", "(1, 32, 1, 1)"; "{name: array}" for weights by name.
SHAPE = re.compile(
    r"\((?:[A-Za-z0-9·²'/]+(?: [+−·] [A-Za-z0-9]+)?,? ?(?:…,? ?)?)*\)|by name|shaped"
)
# Functions whose input cannot be wrong.
NEVER_RAISE = ("to_pytorch",)
ARRAYS = ("jax.Array", "np.ndarray", "jnp.ndarray")


def exported():
    return {name: getattr(ig_jax, name) for name in ig_jax.__all__}


def summary_and_text(documented):
    text = inspect.getdoc(documented)
    assert text, f"{documented.__name__} has no docstring"
    return text.partition("\n\n")[0], text


def fields_of(thing):
    """Names that a person passes or reads: arguments of a function, fields of a class."""
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    if inspect.isclass(thing) and issubclass(thing, nnx.Module):
        thing = thing.__init__
    if inspect.isclass(thing):
        return []
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def describes(text, name):
    """Whether a line "name: …", "name, other: …" or a sentence with the name is there."""
    return re.search(rf"(^|[\s`,(*]){re.escape(name)}($|[\s`,:.)])", text) is not None


@pytest.mark.parametrize("name", ig_jax.__all__)
def test_exported_names(name):
    thing = exported()[name]
    summary, text = summary_and_text(thing)
    assert re.match(r"[A-Z]", summary) and re.search(r"[.)]$", summary), f"{name}: {summary!r}"
    assert len(summary) < 200, f"{name}: the summary is not short: {summary!r}"
    for field in fields_of(thing):
        assert describes(text, field), f"{name}: {field} is not described"
    if inspect.isfunction(thing):
        assert re.search(r"^(Returns|Raises|Yields):", text, re.M), f"{name}: what does it return?"
        assert "InputError" in text or name in NEVER_RAISE, f"{name}: which errors does it raise?"
    signature = str(getattr(thing, "__annotations__", {}))
    if any(kind in signature for kind in ARRAYS):
        assert SHAPE.search(text), f"{name}: the docstring has no shape"


def public_methods(thing):
    own = vars(thing).items() if inspect.isclass(thing) else ()
    for name, member in own:
        member = getattr(member, "__func__", member)
        is_call = name == "__call__"
        if inspect.isfunction(member) and (is_call or not name.startswith("_")):
            yield name, member


@pytest.mark.parametrize(
    "name", [n for n, thing in exported().items() if any(public_methods(thing))]
)
def test_methods_of_exported_classes(name):
    for method, function in public_methods(exported()[name]):
        if method == "replace":  # added by flax.struct
            continue
        text = inspect.getdoc(function)
        assert text, f"{name}.{method} has no docstring"
        for field in fields_of(function):
            assert describes(text, field), f"{name}.{method}: {field} is not described"
        if any(kind in str(function.__annotations__) for kind in ARRAYS):
            assert SHAPE.search(text), f"{name}.{method}: the docstring has no shape"


MODULES = [
    m.name for m in pkgutil.walk_packages([str(ROOT)], "ig_jax.") if "__main__" not in m.name
]


def public_functions(module):
    """(qualified name, node) of the public functions and methods that a file defines."""
    tree = ast.parse(pathlib.Path(inspect.getsourcefile(module)).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member


def raises_input_error(node):
    return any(
        isinstance(inner, ast.Raise)
        and isinstance(inner.exc, ast.Call)
        and getattr(inner.exc.func, "id", "") == "InputError"
        for inner in ast.walk(node)
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_what_it_raises(name):
    """Each file says what it is for, and each public function that raises says so."""
    module = importlib.import_module(name)
    assert re.search(r"[.:]$", (module.__doc__ or "").strip()), f"{name}: no module docstring"
    silent = []
    for function, node in public_functions(module):
        if function.split(".")[-1].startswith("_") or not raises_input_error(node):
            continue
        text = ast.get_docstring(node) or ""
        if not re.search(r"InputError|[Rr]aise|[Rr]efuse", text):
            silent.append(function)
    assert not silent, f"{name}: raised errors are not documented in {', '.join(silent)}"
