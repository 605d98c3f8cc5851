"""The configuration of the site: ``sphinx-build -W -n docs docs/_build`` needs no network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402 - after the path
from docutils import nodes  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from torch import library  # noqa: E402

import lsconv  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))

has_deepinv = importlib.util.find_spec("deepinv") is not None
if has_deepinv:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # beside a CPU build of torch: the package index has torchvision's operators for CUDA only
        for operator in ("nms", "qnms"):
            library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

project = "lsconv"
author = "The lsconv developers"
project_copyright = author
release = version = lsconv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "gallery_scripts", "figures"]
templates_path = ["_templates"]
nitpicky = True

# ------------------------------------------------------------------ links to other projects

_OTHERS = {
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
    "numpy": "https://numpy.org/doc/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
    "deepinv": "https://deepinv.github.io/deepinv",
}
if os.environ.get("LSCONV_DOCS_ONLINE"):  # their inventories come over the network
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {name: (url, None) for name, url in _OTHERS.items()}
# Without them, and of what is private or a type variable, there is no target.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|numpy|np|scipy|scipy_linalg|deepinv|matplotlib|collections|typing|typing_extensions)\..*"),
    (r"py:.*", r"(Tensor|Self|Axes|Figure|Generator|Transform|Any|Callable|Sequence|Iterable|optional|ndarray)"),
    (r"py:.*", r"(int|float|str|bool|complex|bytes|tuple|list|dict|set|type|object|None|dtype|device|enum\..*|Module)"),
    (r"py:.*", r"(ArrayLike|OperatorLike|Bounds|Values|Denoiser|Field|Origin|ConvModule|PlainModule|_T|_Function)"),
    (r"py:.*", r"IterationState|PseudoInverse\.\w+"),
    (r"py:.*", r"lsconv\.tiled\.(?!Plan).*"),
    (r"py:.*", r"lsconv\.(operators|inverse|krylov|border|fourier|factored|nn|app)\..*"),
]

# ------------------------------------------------------------------ the text

source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style"), ("Shape", "notes_style")]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autosummary_generate = True
autosummary_imported_members = False
add_module_names = False
toc_object_entries_show_parents = "hide"

plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 110)]
plot_basedir = str(HERE)

# ------------------------------------------------------------------ the gallery


sphinx_gallery_conf = {
    "examples_dirs": "gallery_scripts",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"__init__\.py" if has_deepinv else r"diffusion_deepinv\.py",
    "within_subsection_order": "gallery_pages.Order",
    "reset_modules": ("gallery_pages.reset",),
    "backreferences_dir": "api/backreferences",
    "doc_module": ("lsconv",),
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 5,
    "plot_gallery": True,
    "write_computation_times": False,
}

# ------------------------------------------------------------------ the pages of the names

_INTRODUCTIONS = {
    "operators": "What A is. Each has `A(x)`, its exact adjoint `A.H`, and algebra: `A @ B`, `A + B`, `2 * A`.",
    "answers": "What a user asks for. Each returns a {class}`lsconv.Solution`; `pinv` returns an operator.",
    "uncertainty": "How sure an answer is, and how probable the data are.",
    "structure": "Numbers that describe an operator, and the preconditioner made from it.",
    "iterations": "The Krylov methods, one by one, with the same arguments and certificates.",
    "tiled": "Images larger than memory, or than one process; `import lsconv` has it as `lsconv.tiled`.",
    "modules": "Modules for networks; `import lsconv` has them as `lsconv.nn`.",
    "psf": "Models of point-spread functions, differentiable; `import lsconv` has them as `lsconv.psf`.",
    "deepinv": "Physics for deepinv; needs the extra `deepinv`, and `import lsconv.deepinv`.",
}

# What references to a module lead to.
_MODULES = {
    group: f"```{{py:module}} lsconv.{module}\n```\n\n"
    for group, module in (("tiled", "tiled"), ("modules", "nn"), ("psf", "psf"), ("deepinv", "deepinv"))
}

# A table of names, each a page of its own.
_SUMMARY = ".. py:currentmodule:: None\n\n.. autosummary::\n   :toctree: generated\n   :nosignatures:\n\n"

# The errors are short enough for one page.
_ERRORS = """\
```python
>>> import torch, lsconv
>>> try:
...     lsconv.Conv2d(torch.ones(1, 1, 3, 3), in_size=(2, 2))
... except lsconv.LsconvError as error:
...     print(type(error).__name__, isinstance(error, ValueError))
ShapeError True

```

```{eval-rst}
.. automodule:: lsconv.errors
   :members:
   :member-order: bysource
   :exclude-members: warn
```
"""


def groups() -> dict[str, list[str]]:
    """The public names in the groups that the comments of ``lsconv.__all__`` make."""
    source = (HERE.parent / "lsconv" / "__init__.py").read_text(encoding="utf-8")
    body = source.partition("__all__ = [\n")[2].partition("]\n")[0]
    found = {part.split("\n")[0]: re.findall(r'"(\w+)"', part) for part in body.split("    # ")[1:]}
    full = {group: [f"lsconv.{name}" for name in names] for group, names in found.items()}
    full["tiled"] = [f"lsconv.tiled.{name}" for name in lsconv.tiled.__all__]
    full["modules"] = [f"lsconv.nn.{name}" for name in lsconv.nn.__all__]
    full["psf"] = [f"lsconv.psf.{name}" for name in lsconv.psf.__all__]
    if has_deepinv:
        guest = importlib.import_module("lsconv.deepinv")
        full["deepinv"] = [f"lsconv.deepinv.{name}" for name in guest.__all__]
    return full


def write(path: Path, text: str) -> None:
    """Write a page, if it is not there already as it should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_names(*_: Any) -> None:
    """The pages of the API by group, and the table of all names that the decision page includes."""
    table = "| group | names |\n|---|---|\n"
    pages = ""
    known = groups()
    for page in (HERE / "api" / "generated").glob("*.rst"):  # of a name that is gone
        if not any(page.stem in names for group, names in known.items() if group != "errors"):
            page.unlink()
    for group, names in known.items():
        listed = "".join(f"   {name}\n" for name in names)
        start = f"{_MODULES.get(group, '')}{_INTRODUCTIONS.get(group, '')}"
        body = _ERRORS if group == "errors" else f"{start}\n\n```{{eval-rst}}\n{_SUMMARY}{listed}```\n"
        write(HERE / "api" / f"{group}.md", f"# {group.capitalize()}\n\n{body}")
        pages += f"{group}\n"
        links = ", ".join(f"{{py:obj}}`{name.removeprefix('lsconv.')} <{name}>`" for name in names)
        table += f"| [{group}](api/{group}.md) | {links} |\n"
    write(
        HERE / "api" / "index.md",
        f"# API\n\nAll public names, by group.\n\n```{{toctree}}\n:maxdepth: 2\n\n{pages}```\n",
    )
    write(HERE / "api" / "names.txt", table)


def public_target(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Resolve a reference to where a name is defined, ``lsconv.errors.ShapeError``, to the page of its public name."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rpartition(".")[2]
    for public in (f"lsconv.{name}", f"lsconv.nn.{name}", f"lsconv.errors.{name}"):
        if public in env.get_domain("py").objects and node["reftarget"] != public:
            return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)
    return None


def without_last_line(_app: Sphinx, doctree: nodes.document) -> None:
    """Drop the empty line at the end of an example, which doctest needs before the fence."""
    for block in doctree.findall(nodes.literal_block):
        if len(block) == 1 and block.astext().endswith("\n"):
            block.rawsource = block.astext().rstrip("\n")  # which Sphinx highlights if it is the text
            block[0] = nodes.Text(block.rawsource)


def setup(app: Sphinx) -> None:
    """Connect what is above to Sphinx."""
    app.connect("config-inited", write_names)
    app.connect("missing-reference", public_target)
    app.connect("doctree-read", without_last_line)


# ------------------------------------------------------------------ how it looks

html_theme = "pydata_sphinx_theme"
html_title = "lsconv"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "start", "which-function", "search", "genindex")}
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
