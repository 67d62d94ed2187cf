"""Compiles triton_fused's kernels for GPUs that need not be there, in a process of its own: Triton can abort it.

    python triton_aot_child.py < jobs

One job is a JSON line ``{target, scheme, activation, m, config}`` with target ``sm_90`` or ``gfx942``, and config the
fields of a Matvec or a Dot. Each is announced before it is compiled and answered after, so that the parent knows which
one was the process's end.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fpxbench.implementation import discover
from fpxbench.numbers.scheme import scheme_named

discover()
from fpxbench.impls import triton_fused  # noqa: E402  (discover makes the package of implementations)

K = 4096
POINTEES = {"float32": "*fp32", "uint8": "*u8"}


def compiled(target, scheme, activation, m, config):
    """The compiled kernel, for M = `m`, K = 4096 and pointers and N that are multiples of 16."""
    scheme = scheme_named(scheme)
    if target.startswith("sm_"):
        gpu, kind = GPUTarget("cuda", int(target[3:]), 32), triton_fused.Target("cuda", int(target[3:]))
    else:
        gpu, kind = GPUTarget("hip", target, 64), triton_fused.Target("hip")
    scales = "*u8" if scheme.scaling.scale_format.coded else "*fp32"
    arguments = {"scales": scales, "tensor_scale": "*fp32", "out": f"*{activation}", "M": "i32", "N": "i32"}
    options = {"num_warps": config["num_warps"]}
    if "words" in config:
        kernel = triton_fused.kernels(False).matvec_kernel
        constants = triton_fused.matvec_constants(scheme, K, m, activation, kind, triton_fused.Matvec(**config))
        arguments |= {"x": "*i64", "packed": "*i32"}
    else:
        kernel = triton_fused.kernels(False).dot_kernel
        constants = triton_fused.dot_constants(scheme, K, activation, kind, triton_fused.Dot(**config))
        arguments |= {"x": f"*{activation}", "packed": "*u8"}
        options["num_stages"] = config["num_stages"]
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name in ("x", "packed", "scales", "tensor_scale", "out", "N")
    }
    return triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=attrs), target=gpu, options=options)


def facts(kernel):
    """What the compiled kernel is, as numbers that a test can judge."""
    assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    binary = kernel.asm.get("cubin") or kernel.asm["hsaco"]
    return {
        "object_bytes": len(binary) if binary[:4] == b"\x7fELF" else 0,
        "shared_bytes": kernel.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|global_load_dwordx4|buffer_load_dwordx4", assembly)),
        "matrix": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", assembly))),
        "native_decodes": assembly.count("cvt.rn.f16x2.e4m3x2"),
        "barriers": len(re.findall(r"bar\.sync|s_barrier", assembly)),
        "stack_bytes": stack_bytes(binary) if "cubin" in kernel.asm else None,
    }


def stack_bytes(cubin):
    """Local memory that a thread takes: what was spilled, or indexed at run time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def main():
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({"begun": job}), flush=True)
        print(json.dumps({"job": job, "facts": facts(compiled(**job))}), flush=True)


if __name__ == "__main__":
    main()
