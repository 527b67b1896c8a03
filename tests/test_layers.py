"""The house rules that no linter knows: imports point down, and dangerous calls stay out."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptcli

ROOT = Path(gptcli.__file__).parent
# From the top floor down; a module may import its own floor and those below.
FLOORS = [
    {"__main__"},
    {"cli"},
    {
        "pretrain",
        "finetune",
        "generate",
        "evaluate",
        "evaluate_task",
        "evaluate_lm_eval",
        "evaluate_memorization",
        "evaluate_pairs",
        "explain",
        "export",
        "import_model",
        "plan",
        "plan_devices",
        "prove_resume",
        "verify",
        "doctor",
        "compare",
        "inspect_data",
        "train_tokenizer",
        "compare_tokenizers",
        "chat",
        "serve",
        "text_recipe",
    },
    {"training"},
    {"reports"},
    {"evaluation"},
    {"generation"},
    {"runs"},
    {"interop"},
    {"data"},
    {"model"},
    {"config"},
    {"stop", "errors", "device", "world", "portable"},
    {"__init__", "shipped"},
]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}


def floor(module: str) -> int:
    room = module.split(".")[0]
    found = [index for index, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"gptcli.{module} is in no room of the house: give it a floor in FLOORS"
    return found[0]


def imported(module: str) -> Iterator[tuple[str, int]]:
    """Modules of gptcli that `module` imports anywhere, function bodies included, with lines."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"gptcli.{module}:{node.lineno}: relative import"
            base = node.module or ""
            names = [
                f"{base}.{a.name}"
                if f"{base}.{a.name}".removeprefix("gptcli.") in MODULES
                else base
                for a in node.names
            ]
        else:
            continue
        for name in names:
            if name == "gptcli":
                yield "__init__", node.lineno
            elif name.startswith("gptcli."):
                yield name.removeprefix("gptcli."), node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A room that imports one above cannot be used, tested or understood without it."""
    for name, line in imported(module):
        assert floor(name) >= floor(module), f"gptcli.{module}:{line} imports gptcli.{name}, above"


def test_no_cycles() -> None:
    """A cycle hidden in function bodies is one all the same: neither module stands alone."""
    edges = {module: {name for name, _ in imported(module)} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "import cycle: " + " > ".join((*path, module))
        if module not in done:
            for name in sorted(edges.get(module, ())):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[-1] == "__init__"])
def test_package_files_re_export_nothing(module: str) -> None:
    """A name with two homes is imported from both, and moving it breaks one."""
    kinds = (ast.Import, ast.ImportFrom)
    assert not any(isinstance(node, kinds) for node in ast.walk(MODULES[module]))


def test_no_junk_drawers() -> None:
    """A function lives with the thing it is about."""
    names = {module.split(".")[-1] for module in MODULES}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("module", MODULES)
def test_no_dangerous_or_stray_constructs(module: str) -> None:
    """Loading a model or config must never run code from it; only cli/ may print or exit."""
    faults = []
    for node in ast.walk(MODULES[module]):
        where = f"gptcli.{module}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            faults += [f"{where}: {fault}" for fault in call_faults(module, node)]
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"{where}: bare except")
        elif isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            faults.append(f"{where}: wildcard import")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            faults += [f"{where}: {fault}" for fault in import_faults(module, node)]
    assert not faults, "\n".join(faults)


FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}


def call_faults(module: str, call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    # Old .bin weights that the user allowed are read by the unpickler that makes tensors only.
    old_weights = name == "torch.load" and module == "interop.hf_pickle" and is_weights_only(call)
    if name in FORBIDDEN_CALLS and not old_weights:
        yield f"{name}()"
    if name in ("np.load", "numpy.load"):
        for keyword in call.keywords:
            if keyword.arg == "allow_pickle" and not is_false(keyword.value):
                yield "np.load with pickles"
    speaks = name in ("print", "sys.exit", "typer.echo", "os._exit")
    own_process = ("cli.", "__main__", "evaluation.sandbox")  # the last is run as a program
    if speaks and not module.startswith(own_process):
        yield f"{name}() below cli/"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_weights_only(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    chosen = given.get("weights_only")
    return isinstance(chosen, ast.Constant) and chosen.value is True


def import_faults(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = (
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    )
    for name in names:
        if name.split(".")[0] in ("rich", "typer", "click") and not module.startswith("cli."):
            yield f"import of {name} below cli/"
        if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve"):
            yield f"import of {name}"
