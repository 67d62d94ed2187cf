"""Write a script that compiles one cell again with nothing but a Triton installed, for a bug report."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from pprint import pformat

from fpxbench.records.verdict import Status
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.engine import CHILD
from fpxbench.targets.matrix import CellOutcome, Matrix
from fpxbench.targets.operations import KERNELS, ProbeSpec

_HEAD = '''\
# {probe} on {architecture}{found}
#
#   pip install "triton{version}"
#   python THIS_FILE
#
# Needs no GPU, and no PyTorch.{linker}
'''

_TAIL = '''
kernel = triton.compile(
    _source({kernel}, {signature}, {{name: _constant(value) for name, value in CONSTANTS.items()}}, {divisible}),
    target=GPUTarget({backend!r}, {arch!r}, {warp_size}), options={options},
)
print(kernel.asm[{text!r}])
binary = kernel.asm[{object!r}]
print("object:", len(binary), "bytes" if binary[:4] == b"\\x7fELF" else "bytes, not an ELF file")
'''

_INDUCTOR = '''\
# {probe} on {architecture}{found}
#
#   pip install torch triton
#   python THIS_FILE
#
# Needs no GPU: prints the module that torch.compile would write for one, and compiles its kernels.

{source}


REQUEST = {request}

prepare(REQUEST)
wrapper = generated(REQUEST)
print(wrapper)
print({launches}(wrapper))
for name, source in kernels_of(wrapper).items():
    kernel, config = built(name, source, REQUEST)
    print(name, config, "compiles")
'''


def script(spec: ProbeSpec, architecture: Architecture, triton: str = "", found: str = "") -> str:
    """Return the source of a script for that cell: the kernel, the call, and code for all versions of Triton.

    `triton` is the version to install; `found` describes what happened with it.
    """
    request = spec.request(architecture)
    if "inductor" in request:
        return _of_inductor(spec, architecture, request, found)
    amd = request["backend"] == "hip"
    head = _HEAD.format(
        probe=spec.id, architecture=architecture.name, version=f"=={triton}" if triton else "",
        found="".join(f"\n#   {line}" for line in f": {found}".lstrip(": ").splitlines()) if found else "",
        linker=" Triton before 3.5 links with the program that TRITON_HIP_LLD_PATH names (ld.lld)." if amd else "",
    )
    compiling = CHILD / "compiling.py"
    body = [
        _definitions(compiling, "VERSION"), _kernel_source(Path(request["file"]), request["kernel"]),
        f"CONSTANTS = {pformat(request['constants'], width=120)}", _definitions(compiling, "_constant", "_source"),
        _TAIL.format(kernel=request["kernel"], signature=request["signature"], divisible=request["divisible"],
                     backend=request["backend"],
                     arch=request["arch"], warp_size=request["warp_size"], options=request["options"],
                     text="amdgcn" if amd else "ptx", object="hsaco" if amd else "cubin"),
    ]
    return "\n\n".join(part.strip("\n") for part in [head, _imports(compiling, body), *body]) + "\n"


def failure_summary(outcome: CellOutcome, first: str, last: str) -> str:
    """Return the text at a script's head: the outcome from Triton `first` to `last`, with the evidence if it is wrong.
    """
    kind = f" ({outcome.kind})" if outcome.kind else ""
    since = "" if first == last else f", and from {first} on"
    text = f"with {last}{since}: {outcome.status}{kind}: {outcome.cause}"
    return f"{text}\n{outcome.message}" if outcome.status is Status.WRONG and outcome.message else text


def newest_failure(matrix: Matrix, probe: str, architecture: str, triton: str = "") -> tuple[str, str]:
    """Return the newest version of Triton (or `triton`) on which that cell is not ok, and its `failure_summary`.

    Both are empty if there is none.
    """
    versions = [build.triton for build in matrix.builds]
    runs = [run for one in matrix.probes if one.id == probe for run in one.cells.get(architecture, ())]
    if triton:
        runs = [run for run in runs if triton in versions[run.builds[0]:run.builds[1] + 1]]
    if not runs or matrix.outcomes[runs[-1].outcome].status in (Status.OK, Status.MISSING):
        return "", ""
    first, last = (versions[at] for at in runs[-1].builds)
    return triton or last, failure_summary(matrix.outcomes[runs[-1].outcome], first, last)


def _of_inductor(spec: ProbeSpec, architecture: Architecture, request: dict, found: str) -> str:
    """Return a script with the whole module that calls Inductor, and the request."""
    source = (CHILD / "inductor.py").read_text(encoding="utf-8").split('"""', 2)[2].strip("\n")
    request_ = {name: value for name, value in request.items() if name != "file"}
    return _INDUCTOR.format(probe=spec.id, architecture=architecture.name,
                            found="".join(f"\n#   {line}" for line in found.splitlines()),
                            source=source, launches="store_of" if "stored" in request["inductor"] else "launches_of",
                            request=pformat(request_, width=120))


# A report has hundreds of scripts, made of the same few parts.

def _imports(file: Path, body: list[str]) -> str:
    """Return the imports of `file` that `body` uses, and those that Triton needs."""
    lines = _import_lines(file)
    used = set().union(*map(_names, body), *(_names(line) for line, names in lines if not names))
    return "\n".join(line for line, names in lines if not names or names & used)


@cache
def _import_lines(file: Path) -> list[tuple[str, frozenset[str]]]:
    """Return the imports of a file as code, with the names that they bind; none for an import in a ``try``, always
    kept.
    """
    return [
        (ast.unparse(node), frozenset() if isinstance(node, ast.Try) else frozenset(name.asname or name.name
                                                                                    for name in node.names))
        for node in _parsed(file)[1].body if isinstance(node, (ast.Import, ast.ImportFrom, ast.Try))
    ]


@cache
def _parsed(file: Path) -> tuple[str, ast.Module]:
    source = file.read_text()
    return source, ast.parse(source)


@cache
def _names(code: str) -> frozenset[str]:
    return frozenset(node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name))


@cache
def _definitions(file: Path, *names: str) -> str:
    """Return the definitions of those names, as written."""
    source, module = _parsed(file)
    found = [
        ast.get_source_segment(source, node) or "" for node in module.body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names)
    ]
    return "\n\n\n".join(found)


def _kernel_source(file: Path, kernel: str) -> str:
    """Return the kernel; of another file than kernels.py the whole module, as its kernels call each other."""
    source, module = _parsed(file)
    if file != KERNELS:
        return source.split('"""', 2)[2]
    node = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == kernel)
    return "\n".join(source.splitlines()[node.decorator_list[0].lineno - 1:node.end_lineno])
