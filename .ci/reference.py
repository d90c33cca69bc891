"""The reference: one page of every public name, from the docstrings, by pdoc.

    python -W error .ci/reference.py

writes `out/reference/efcp_jax.html`, and fails where a name, a formula, a link or a
section of a docstring did not arrive whole. By pdoc, as docstrings are Markdown with
sections in Google's style: to Sphinx their tables and backticks are something else.
"""

import ast
import html
import inspect
from pathlib import Path
import re
import sys
from types import ModuleType

import pdoc

import efcp_jax


OUTPUT = Path(__file__).parents[1] / "out" / "reference"
MODULES = [efcp_jax, efcp_jax.sharding]
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)
_LINK = re.compile(r"`[^`<]+<(https://[^>]+)>`_")
_LEFT_OVER = re.compile(
    r"<p>(Args|Returns|Raises|Examples|References|Notes):|&gt;`_|\\</td>"
)


class Written:
    """An annotation as its source has it, in place of what its aliases stand for."""

    def __init__(self, node: ast.expr):
        """Take the annotation out of a syntax tree."""
        self.text = ast.unparse(node)

    def __repr__(self) -> str:
        return self.text


def public(module: ModuleType) -> list[str]:
    """Return the names that a module offers: defined in it, or imported `X as X`."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names += [each.asname for each in node.names if each.asname]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def as_written(documented) -> None:
    """Let annotations, of a function or of a class's fields, read as in the source."""
    node = ast.parse(inspect.getsource(documented)).body[0]
    annotations = documented.__annotations__
    if isinstance(node, ast.ClassDef):
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                annotations[each.target.id] = Written(each.annotation)
        for field in getattr(documented, "_fields", ()):
            # "Alias for field number 0"; the docstring of the class says more.
            getattr(documented, field).__doc__ = ""
    elif isinstance(node, ast.FunctionDef):
        given = node.args
        for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
            if each.annotation:
                annotations[each.arg] = Written(each.annotation)
        if node.returns:
            annotations["return"] = Written(node.returns)


def missing(module: ModuleType, page: str) -> list[str]:
    """Return what the docstrings of a module have and its page has not."""
    squeeze = lambda text: " ".join(html.unescape(text).split())
    text = squeeze(page)
    named = {name: vars(module)[name] for name in public(module)}
    members = {k: v for k, v in named.items() if not isinstance(v, ModuleType)}
    lost = [name for name in members if f'id="{name}"' not in page]
    for name, documented in {module.__name__: module, **members}.items():
        docstring = inspect.getdoc(documented)
        if not docstring:
            lost.append(f"the docstring of {name}")
            continue
        formulas = [squeeze(each[0]) for each in _FORMULA.finditer(docstring)]
        lost += [f"{name}: {each}" for each in formulas if each not in text]
        links = [f'href="{each}"' for each in _LINK.findall(docstring)]
        lost += [f"{name}: {each}" for each in links if each not in page]
    return lost + [f"left over: {each[0]}" for each in _LEFT_OVER.finditer(page)]


def main() -> None:
    """Write the pages and look at them."""
    for module in MODULES:
        module.__all__ = public(module)
        for name in module.__all__:
            as_written(getattr(module, name))
    pdoc.render.configure(
        docformat="google", math=True, search=False, show_source=False
    )
    pdoc.pdoc("efcp_jax", output_directory=OUTPUT)
    for module in MODULES:
        path = OUTPUT / (module.__name__.replace(".", "/") + ".html")
        if lost := missing(module, path.read_text()):
            sys.exit(f"{path} lacks:\n" + "\n".join(lost))
        print(f"{path}: {len(module.__all__)} names")


if __name__ == "__main__":
    main()
