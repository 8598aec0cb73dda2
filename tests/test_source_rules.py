"""No line of the project may run what a file holds: read from the syntax tree, which no line break deceives."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}
# A function of the user's own file, named on the command line, is the one thing run; the others import packages.
RUNS_FILES = (
    "diffusion_align/rewards/custom.py",
    "diffusion_align/commands/doctor.py",
    "tests/stress/offline.py",
)
FETCHES = {"urlopen", "urlretrieve", "HTTPConnection", "HTTPSConnection"}


def dotted(node):
    """`a.b.c` of a name or an attribute, where "?" is anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def is_own_module(node):
    """Whether a module's name is written down here, or is one of this package."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
        return isinstance(node, ast.Constant) and str(node.value).startswith((".", "diffusion_align."))
    return isinstance(node, ast.Constant)


def is_word(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def faults(source, path=""):
    """Every broken rule of a source text as (line, rule)."""
    tree = ast.parse(source)
    names = renamed(tree)
    safe = set(SAFE_LOADERS)
    for node in ast.walk(tree):  # a class stands behind its bases
        if isinstance(node, ast.ClassDef) and any(dotted(base).split(".")[-1] in safe for base in node.bases):
            safe.add(node.name)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [(node.lineno, "unpickler") for module in modules if module.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Attribute | ast.Name) and dotted(node).endswith("LOAD_TRUNCATED_IMAGES"):
            if isinstance(node.ctx, ast.Store):
                found.append((node.lineno, "truncated pictures"))
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                (node.lineno, "trust_remote_code")
                for key, value in pairs
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not is_word(value, False)
            ]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, rule) for rule in of_call(node, names, safe, path)]
    return found


def renamed(tree):
    """What each imported name stands for: `from os import system as s` makes s os.system."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_call(node, names, safe, path):
    """The rules that one call breaks."""
    given = {word.arg: word.value for word in node.keywords}
    first, _, rest = dotted(node.func).partition(".")
    name = ".".join(filter(None, (names.get(first, first), rest)))
    # A call on something that has no name, such as f().extractall(), is judged by its last word.
    last = node.func.attr if isinstance(node.func, ast.Attribute) else name.split(".")[-1]
    if last == "load" and name.split(".")[0] in ("torch", "pt") and not is_word(given.get("weights_only"), True):
        yield "torch.load"
    if last in ("load", "load_all") and name.startswith("yaml."):
        loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if dotted(loader).split(".")[-1] not in safe:
            yield "yaml"
    if last in ("full_load", "unsafe_load", "full_load_all", "unsafe_load_all"):
        yield "yaml"
    if name in ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile", "runpy.run_path"):
        yield "text as code"
    if last in ("import_module", "__import__") and node.args and is_own_module(node.args[0]):
        return
    if last in ("exec_module", "import_module", "run_path", "run_module", "__import__") and path not in RUNS_FILES:
        yield "a file as code"
    if "allow_pickle" in given and not is_word(given["allow_pickle"], False):
        yield "allow_pickle"
    if ("shell" in given and not is_word(given["shell"], False)) or name in SHELLS:
        yield "shell"
    if "trust_remote_code" in given and not is_word(given["trust_remote_code"], False):
        yield "trust_remote_code"
    if last in ("extractall", "unpack_archive") or (last == "extract" and "tar" in name.lower()):
        yield "extract"
    if last == "mktemp":
        yield "mktemp"
    if last in FETCHES and "timeout" not in given:
        yield "no time-out"
    if (
        name.startswith(("requests.", "httpx."))
        and last in ("get", "post", "request", "put")
        and "timeout" not in given
    ):
        yield "no time-out"
    if name.startswith("torch.jit.") and last == "load":
        yield "text as code"


def sources():
    """Path and text of every file of package, scripts, examples and stress programs, and of the cells of notebooks."""
    for folder in ("diffusion_align", "scripts", "examples", "tests/stress"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines(keepends=True)
                # Magics are no Python, and a shell line is a shell line.
                assert not any(line.lstrip().startswith(("!", "%")) for line in lines), f"{path.name} cell {number}"
                yield f"{path.name} cell {number}", "".join(lines)


def test_no_line_of_the_project_runs_what_a_file_holds():
    texts = list(sources())
    assert len(texts) > 150, "the sources were not found"
    found = [(path, *fault) for path, text in texts for fault in faults(text, path)]
    assert [fault for fault in found if not is_bait(*fault)] == []


def is_bait(path, line, rule):
    """The hostile files of the stress programs need what is forbidden: pickles, and words in configurations."""
    return path.startswith("tests/stress/hostile/") and rule in ("unpickler", "trust_remote_code")


CODE = {
    "torch.load": (
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "import torch as t\nt.load(p)",
        "from torch import load\nload(p)",
        "torch.serialization.load(\n    p,\n)",
    ),
    "unpickler": (
        "import pickle",
        "import os, dill as d",
        "from joblib import load",
        "import cPickle",
        "def f():\n    import shelve",
        "from marshal import loads",
        "import pickle.whatever",
    ),
    "yaml": (
        "yaml.load(t)",
        "yaml.load(t, Loader=yaml.Loader)",
        "yaml.load(t, yaml.FullLoader)",
        "yaml.full_load(t)",
        "from yaml import unsafe_load\nunsafe_load(t)",
        "class L(yaml.UnsafeLoader): pass\nyaml.load(t, Loader=L)",
        "import yaml as y\ny.load(t)",
    ),
    "text as code": (
        "eval(t)",
        "exec(open(f).read())",
        "compile(t, '', 'exec')",
        "import builtins as b\nb.eval(t)",
        "torch.jit.load(p)",
    ),
    "a file as code": (
        "spec.loader.exec_module(m)",
        "importlib.import_module(name)",
        "runpy.run_path(p)",
        "__import__(n)",
        "import_module(f'{name}.py')",
    ),
    "allow_pickle": ("np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)"),
    "shell": (
        "subprocess.run(c, shell=True)",
        "subprocess.Popen(c, shell=flag)",
        "os.system(c)",
        "from os import popen\npopen(c)",
        "import os as o\no.system(c)",
        "subprocess.getoutput(c)",
    ),
    "truncated pictures": (
        "ImageFile.LOAD_TRUNCATED_IMAGES = True",
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES: bool = flag",
    ),
    "trust_remote_code": (
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "f(trust_remote_code=o.trust)",
        "f(**{'trust_remote_code': True})",
    ),
    "extract": (
        "tarfile.open(p).extractall()",
        "tar.extract(m)",
        "zipfile.ZipFile(p).extractall(d)",
        "shutil.unpack_archive(p)",
    ),
    "mktemp": ("tempfile.mktemp()", "from tempfile import mktemp\nmktemp()"),
    "no time-out": (
        "urllib.request.urlopen(u)",
        "requests.get(u)",
        "httpx.post(u, json=j)",
        "http.client.HTTPConnection(h)",
        "from urllib.request import urlretrieve\nurlretrieve(u)",
    ),
}


@pytest.mark.parametrize(("rule", "code"), [(rule, code) for rule, codes in CODE.items() for code in codes])
def test_every_rule_catches_what_it_forbids(rule, code):
    assert rule in [found for _, found in faults(code)]


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p, weights_only=True)",
        "json.load(f)",
        "class _Loader(yaml.SafeLoader): pass\nyaml.load(t, Loader=_Loader)",
        "yaml.safe_load(t)",
        "re.compile(t)",
        "import_module(f'.{room}', __name__)",
        "importlib.import_module('bitsandbytes')",
        "f().eval()",
        "model.eval()",
        "subprocess.run([sys.executable, f])",
        "f(shell=False, trust_remote_code=False, allow_pickle=False)",
        "if ImageFile.LOAD_TRUNCATED_IMAGES: raise RuntimeError",
        "urlopen(u, timeout=5)",
        "archive.extractfile(m)",
        "# torch.load(p), pickle, eval(t)",
        "'os.system(c)'",
    ],
)
def test_what_is_allowed_passes(code):
    assert faults(code) == []


def test_a_file_is_run_as_code_in_one_place_only():
    code = "spec.loader.exec_module(m)"
    assert faults(code, "diffusion_align/rewards/custom.py") == [] != faults(code, "diffusion_align/rewards/load.py")
