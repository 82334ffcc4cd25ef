"""docs/architecture.md as a test: import directions, lean import, no model names in the product."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {
    "ternc": "top",
    "ternc.attention_math": "vocabulary",
    "ternc.config": "vocabulary",
    "ternc.csrc": "csrc",
    "ternc.decision": "vocabulary",
    "ternc.errors": "vocabulary",
    "ternc.formats": "vocabulary",
    "ternc.html_chart": "vocabulary",
    "ternc.html_graph": "vocabulary",
    "ternc.html_report": "vocabulary",
    "ternc.policy": "vocabulary",
    "ternc.progress": "vocabulary",
    "ternc.reporting": "vocabulary",
    "ternc.site": "vocabulary",
    "ternc.runtime": "runtime",
    "ternc.runtime.cpu": "cpu",
    "ternc.runtime.dispatch": "ops",
    "ternc.runtime.ops": "ops",
    "ternc.passes": "passes",
}
"""Module prefix -> layer; the longest prefix wins."""

MAY_IMPORT = {
    "vocabulary": {"vocabulary"},
    "csrc": set(),
    "ops": {"vocabulary", "ops"},
    "runtime": {"vocabulary", "ops", "runtime", "cpu"},
    "cpu": {"vocabulary", "csrc"},
    "passes": {"vocabulary", "ops", "passes"},
    "top": {"vocabulary", "ops", "runtime", "cpu", "passes", "top"},
}

EXCEPTIONS = {("ternc.runtime.cpu", "ternc")}
"""(module, imported): cpu.py asks the package where it is installed."""

MODEL_NAMES = (
    r"bert|llama(?!\.cpp)|gpt2|gpt_?neo|qwen|mistral|mixtral|gemma|roberta|minilm|\bt5\b|\bvit\b"
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "ternc" else ("ternc", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("ternc", "passes", "runtime", "csrc")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def layer(module):
    known = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    return LAYERS[max(known, key=len)]


def imports(path):
    """(module imported, whether at module level) of every import; type-only imports left out."""
    tree = ast.parse(path.read_text())
    stack = [(node, True) for node in tree.body]
    while stack:
        node, at_top = stack.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in SOURCES else node.module), at_top
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            children = ast.iter_child_nodes(node)
            stack.extend((child, at_top and not function) for child in children)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    for imported, _ in imports(SOURCES[module]):
        assert imported.split(".")[0] not in ("passes", "runtime", "csrc"), (
            f"{module} imports {imported}: import it as ternc.{imported}"
        )
        if imported.split(".")[0] == "ternc" and (module, imported) not in EXCEPTIONS:
            assert layer(imported) in MAY_IMPORT[layer(module)], (
                f"{module} ({layer(module)}) imports {imported} ({layer(imported)})"
            )


@pytest.mark.parametrize("module", SOURCES)
def test_optional_packages_are_imported_where_they_are_used(module):
    """At module level only torch and the standard library; Triton only inside its own kernels."""
    allowed = {"torch", "ternc", "__future__"} | set(sys.stdlib_module_names)
    if module.startswith("ternc.runtime.kernels."):
        allowed.add("triton")
    for imported, at_top in imports(SOURCES[module]):
        name = imported.split(".")[0]
        assert not at_top or name in allowed, f"{module} imports {name} at module level"


@pytest.mark.parametrize("module", SOURCES)
def test_product_names_no_model(module):
    found = re.search(MODEL_NAMES, SOURCES[module].read_text(), re.IGNORECASE)
    assert not found, f"{module} says {found and found.group()!r}"


def test_import_does_no_work():
    """`import ternc` after torch loads ternc itself and nothing else; no GPU, no library."""
    script = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter()\n"
        "import ternc; seconds = time.perf_counter() - start\n"
        "print(' '.join(sorted(set(sys.modules) - before)))\n"
        "print(f'{1000 * seconds:.1f} ms', file=sys.stderr)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert '_C' not in ' '.join(name for name in sys.modules if name.startswith('ternc'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    print(done.stderr)
    assert done.stdout.split() == ["ternc"]


def test_every_public_name_exists():
    import ternc

    for name in ternc.__all__:
        assert getattr(ternc, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ternc.nonsense  # noqa: B018


def test_modules_are_not_loaded_under_two_names():
    for folder in ("passes", "runtime"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
        )
        assert f"import this folder as ternc.{folder}" in done.stderr
