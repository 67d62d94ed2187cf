"""Compile one kernel with the current Triton, from 3.0 on. The differences between its versions are confined here."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
import types

try:
    import setuptools  # noqa: F401
except ImportError:
    # Triton up to 3.2 imports it to build its launcher in C, which is not needed here.
    sys.modules["setuptools"] = types.ModuleType("setuptools")

import kernel_metadata
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
_modules = {}


def warmed_up():
    """Return this Triton's identity, after doing once what each fork would otherwise repeat."""
    key = _triton_key()
    import triton.compiler.code_generator  # the first compilation imports it

    for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        with contextlib.suppress(Exception):    # each compilation for such a target reports the same
            make_backend(target).hash()     # runs the assembler or linker for its version
    return {"triton": triton.__version__, "key": key, "python": ".".join(map(str, sys.version_info[:3])),
            "torch": _torch_version(),
            "links_in_process": not _wants_linker()}


def _torch_version():
    """Return the version of the PyTorch beside this Triton, without importing it; empty if there is none."""
    try:
        return importlib.metadata.version("torch") if importlib.util.find_spec("torch") else ""
    except importlib.metadata.PackageNotFoundError:     # a checkout on the path
        return "unknown"


def _triton_key():
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        from triton.compiler.compiler import triton_key
    return triton_key()


def _wants_linker():
    """Return whether a separate program links objects for AMD GPUs (up to 3.4)."""
    from triton.backends.amd.compiler import HIPBackend

    return hasattr(HIPBackend, "path_to_rocm_lld")


def prepare(request):
    """Load the request's source file, and let Triton read its kernel; `compiled` raises any error."""
    path = request["file"]
    if path not in _modules:
        spec = importlib.util.spec_from_file_location(f"kernels_{len(_modules)}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            _modules[path] = module
        except Exception as error:
            _modules[path] = error
    with contextlib.suppress(Exception):    # the compilation raises the same
        _ = getattr(_modules[path], request["kernel"]).cache_key


def compiled(request):
    """Return metadata of the object that a request is compiled to.

    A request: ``file`` and ``kernel`` name the function; ``backend`` (cuda, hip), ``arch`` (90, "gfx942") and
    ``warp_size`` the GPU; ``signature`` has the type of each argument that is not constant, by name and in any order;
    ``constants`` the others, where ``{"dtype": "bfloat16"}`` is a Triton dtype and a list a tuple; ``divisible`` the
    arguments that are multiples of 16; ``options`` are the compiler's; ``needs`` names what the kernel uses of
    ``triton.language``; ``assembly`` and ``sass`` request more metadata.
    """
    module = _modules[request["file"]]
    if isinstance(module, Exception):
        raise module
    for needed in request.get("needs", ()):
        if not hasattr(tl, needed):
            raise NotImplementedError("this build has no tl." + needed)
    function = getattr(module, request["kernel"])
    constants = {name: _constant(value) for name, value in request["constants"].items()}
    source = _source(function, request["signature"], constants, set(request["divisible"]))
    target = GPUTarget(request["backend"], request["arch"], request["warp_size"])
    kernel = triton.compile(source, target=target, options=dict(request["options"]))
    return kernel_metadata.of(kernel, request["backend"], bool(request.get("assembly")),
                              _disassembler() if request.get("sass") else None)


def _constant(value):
    if isinstance(value, dict):
        return getattr(tl, value["dtype"])
    return tuple(map(_constant, value)) if isinstance(value, list) else value


def _source(function, types_, constants, divisible):
    names = function.arg_names
    if VERSION >= (3, 3):
        signature = {name: "constexpr" if name in constants else types_[name] for name in names}
        attrs = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in divisible}
        return ASTSource(function, signature, constexprs=constants, attrs=attrs)
    if VERSION >= (3, 2):
        from triton.backends.compiler import AttrsDescriptor

        attrs = AttrsDescriptor.from_hints({at: 16 for at, name in enumerate(names) if name in divisible})
        signature = {name: types_[name] for name in names if name not in constants}
        return ASTSource(function, signature, constants=constants, attrs=attrs)
    from triton.compiler.compiler import AttrsDescriptor

    attrs = AttrsDescriptor(divisible_by_16={at for at, name in enumerate(names) if name in divisible},
                            equal_to_1=set())
    signature = {at: types_[name] for at, name in enumerate(names) if name not in constants}
    return ASTSource(function, signature, constants={names.index(name): value for name, value in constants.items()},
                     attrs=attrs)


@functools.cache
def _disassembler():
    """Return the path of NVIDIA's disassembler in this Triton, or None."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    return path if os.access(path, os.X_OK) else None
