"""A Triton that compiles nothing: the architecture decides what happens to a kernel."""

from pathlib import Path

_FILES = {
    "__init__.py": """
        __version__ = "3.9.9"
        class jit:
            def __init__(self, function):
                code = function.__code__
                self.arg_names, self.cache_key = code.co_varnames[:code.co_argcount], function.__name__
        from .fate import compile
    """,
    "language.py": "constexpr = float32 = None",
    "backends/__init__.py": "",
    "backends/compiler.py": """
        from collections import namedtuple
        GPUTarget = namedtuple("GPUTarget", "backend arch warp_size")
    """,
    "backends/amd/__init__.py": "",
    "backends/amd/compiler.py": "class HIPBackend: pass",
    "compiler/__init__.py": """
        class ASTSource:
            def __init__(self, function, signature, constexprs, attrs):
                self.function, self.signature = function, signature
    """,
    "compiler/compiler.py": """
        def make_backend(target):
            raise RuntimeError("none")
    """,
    "compiler/code_generator.py": "",
    "runtime/__init__.py": "",
    "runtime/cache.py": "def triton_key(): return open(__file__.replace('runtime/cache.py', 'fate.py')).read()",
    "fate.py": """
        import os, struct, subprocess, sys
        from types import SimpleNamespace
        PTX = ".visible .entry convert(\\n.param .u64 a\\n)\\n{\\nmov.u32 %r1, 0;\\nret;\\n}\\n"

        class CompilationError(Exception):
            pass

        def compile(source, target, options):
            # An ELF header, and one section without content.
            elf = b"\\x7fELF".ljust(0x28, b"\\0") + struct.pack("<Q", 64) + struct.pack("<10xHHH", 64, 1, 0)
            elf += struct.pack("<II", 0, 8) + bytes(56)
            arch = target.arch
            if arch == 120:
                print("'sm_120' is not a recognized processor for this target (ignoring processor)", file=sys.stderr)
            if "*fp32" == source.signature["source"] or arch == 80:
                pass
            elif arch == 86:
                os.write(2, b"LLVM ERROR: the injected abort\\n")
                os.abort()
            elif arch == 89:
                refusal = "type fp8e4b8 not supported in this architecture. The ..."
                raise CompilationError(f"at 1:0:\\ndef convert(\\n^\\nValueError(\\"{refusal}\\")")
            elif arch == 90:
                subprocess.run(["sleep", "600.25"])
            elif arch == 100:
                elf = b""
            elif arch == 103:
                os._exit(3)
            elif arch == "gfx942":
                os.write(2, b"error: instruction not supported on this GPU\\n        v_cvt_pk_f32_fp8 v[2:3], v2\\n")
            elif arch == "gfx950":
                elf = b"not an ELF file"
            text, binary = ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
            return SimpleNamespace(asm={text: PTX, binary: elf}, metadata=SimpleNamespace(shared=0))
    """,
}


def write(folder, **changed):
    """Return the package in `folder`, with the content of some files (by ``name__py``) replaced."""
    from textwrap import dedent

    for name, content in _FILES.items():
        path = Path(folder) / "triton" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(changed.get(name.replace("/", "_").replace(".", "__"), content)))
    return Path(folder)
