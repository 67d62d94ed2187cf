"""Compiles triton_fused's kernels for GPUs that need not be there, in a process of its own: Triton can abort it.

    python triton_aot_child.py < jobs

One job is a JSON line ``{target, scheme, activation, m, kernel, config}`` with target ``sm_90`` or ``gfx942``, kernel
``matvec``, ``dot``, ``fragment`` or ``stream``, and config the fields of a Matvec, a Dot, a Tile or a StreamTile. Each
is announced before it is compiled and answered after, so that the parent knows which one was the process's end.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fpxbench.implementation import discover
from fpxbench.numbers.scheme import scheme_named

discover()
from fpxbench.impls import _fragment, _fragment_weight, _planar, _tiles  # noqa: E402  (discover makes the package)
from fpxbench.impls._triton_modules import kernels  # noqa: E402

K = 4096
ALIGNED = {"x", "zeros", "packed", "scales", "tensor_scale", "row_scale", "out", "parts", "N", "X_STRIDE"}


def planar_job(target, scheme, activation, m, kernel, config):
    kind = _planar.Target("cuda", int(target[3:])) if target.startswith("sm_") else _planar.Target("hip")
    scales = "*u8" if scheme.scaling.scale_format.coded else "*fp32"
    arguments = {"scales": scales, "tensor_scale": "*fp32", "out": f"*{activation}"}
    options = {"num_warps": config["num_warps"]}
    if kernel == "matvec":
        constants = _planar.matvec_constants(scheme, K, m, activation, kind, _planar.Matvec(**config))
        arguments |= {"x": "*i64", "packed": "*i32"}
    else:
        constants = _planar.dot_constants(scheme, K, activation, kind, _planar.Dot(**config))
        arguments |= {"x": f"*{activation}", "packed": "*u8"}
        options["num_stages"] = config["num_stages"]
    return getattr(kernels("_triton_kernels", False), f"{kernel}_kernel"), arguments, constants, options


def fragment_job(target, scheme, activation, kernel, config):
    scaling = _fragment_weight.scaling_kind(scheme.scaling)
    block = scheme.scaling.block if scaling == "fp32" else 0
    constants = _fragment_weight.constants(scheme.format, scaling, block, activation == "bf16")
    arguments = {"x": f"*{activation}", "packed": "*i32", "scales": "*fp32" if scaling == "fp32" else "*i32",
                 "row_scale": "*fp32", "out": f"*{activation}"}
    if kernel == "fragment":
        tile = _tiles.Tile(**config)
        constants |= _fragment.tile_constants(tile) | {
            "PTX": True, "OVERLAP": _fragment.overlap_of(tile, int(target[3:])),
            "TAIL": activation == "fp16" and not tile.ordered}      # so that both are compiled
        arguments["zeros"] = f"*{activation}"
        return kernels("_fragment_kernel", False).fragment_kernel, arguments, constants, {
            "num_warps": tile.warps_n * tile.warps_k, "num_stages": 1}
    tile = _tiles.StreamTile(**config)
    constants = _fragment_weight.constants(scheme.format, scaling, block, activation == "bf16", own=True)
    element = arguments.pop("x")[1:]
    for name, (block, layout) in _fragment.descriptor_layouts(tile, constants["BITS"], constants["HALVES"]).items():
        arguments[name] = f"tensordesc<{element if name == 'x_desc' else 'i32'}{block},{layout!r}>"
    arguments["parts"] = "*fp32"
    options = {name: value for name, value in _fragment.stream_options(tile).items() if value}
    return (kernels("_stream_kernel", False).stream_kernel, arguments, constants | _fragment.stream_constants(tile),
            options)


def compiled(target, scheme, activation, m, kernel, config):
    """Return the compiled kernel, for M = `m`, K = 4096 and pointers and N that are multiples of 16."""
    scheme = scheme_named(scheme)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    if kernel in ("matvec", "dot"):
        function, arguments, constants, options = planar_job(target, scheme, activation, m, kernel, config)
    else:
        function, arguments, constants, options = fragment_job(target, scheme, activation, kernel, config)
    signature = {name: "constexpr" if name in constants else arguments.get(name, "i32") for name in function.arg_names}
    attrs = {(position,): [["tt.divisibility", 16]]
             for position, name in enumerate(function.arg_names) if name in ALIGNED}
    source = ASTSource
    if kernel == "stream":
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return triton.compile(source(function, signature, constexprs=constants, attrs=attrs), target=gpu, options=options)


def facts(compiled_kernel, disassembled):
    """Return what the compiled kernel is, as numbers that a test can judge. If `disassembled`, what NVIDIA's machine
    code holds too: its disassembler takes half a second."""
    assembly = compiled_kernel.asm.get("ptx") or compiled_kernel.asm["amdgcn"]
    binary = compiled_kernel.asm.get("cubin") or compiled_kernel.asm["hsaco"]
    found = {
        "object_bytes": len(binary) if binary[:4] == b"\x7fELF" else 0,
        "shared_bytes": compiled_kernel.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|global_load_dwordx4|buffer_load_dwordx4", assembly)),
        "matrix": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", assembly))),
        "native_decodes": assembly.count("cvt.rn.f16x2.e4m3x2"),
        "barriers": len(re.findall(r"bar\.sync|s_barrier", assembly)),
        "stack_bytes": None,
    }
    if "cubin" not in compiled_kernel.asm:
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        found["stack_bytes"] = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
        if not disassembled:
            return found
        sass = tool("nvdisasm", "-c", file.name)
    loop = Counter(main_loop(sass))
    granted = [int(registers) for registers in re.findall(r"setmaxnreg\S+\s+(\d+)", assembly)]
    return found | {
        "registers": max(granted, default=int(re.search(r"REG:(\d+)", usage)[1])),
        "loop_instructions": sum(loop.values()),
        "loop_shared": sum(count for name, count in loop.items() if name in ("STS", "LDS", "LDSM", "STSM")),
        "loop_stores": loop["STS"] + loop["STSM"],
        "loop_exchanges": loop["SHFL"] + loop["MOVM"],
        "loop_barriers": loop["BAR"],
        "loop_products": loop["HGMMA"] + loop["HMMA"],
        "loop_waits": loop["WARPGROUP.DEPBAR"],
        # ACQBULK waits for the kernels before; x alone is loaded with EL (evict last)
        "waits": sass.count("ACQBULK"),
        "x_before_wait": sass.partition("ACQBULK")[0].count("LDG.E.EL"),
        "memory_before_wait": len(re.findall(r"\b(?:LD|ST|LDG|STG|ATOMG|RED|UTMALDG|UTMASTG|UBLKCP)\b[.\w]*",
                                             sass.partition("ACQBULK")[0])),
        "triggered_before_products": triggered_before_products(assembly),
        "trigger_waited": trigger_waited(assembly),
    }


def triggered_before_products(assembly):
    """Return whether the code that lets the next kernel begin comes before the matrix instructions; None without."""
    trigger = assembly.find("griddepcontrol.launch_dependents")
    return None if trigger < 0 else trigger < assembly.find("mma")


def trigger_waited(assembly):
    """Return whether a wait for the kernels before precedes the code that lets the next kernel begin; None without that
    code."""
    trigger = assembly.find("griddepcontrol.launch_dependents")
    return None if trigger < 0 else "griddepcontrol.wait" in assembly[:trigger]


def tool(name, *arguments):
    path = Path(triton.knobs.nvidia.cuobjdump.path).with_name(name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(sass):
    """Return the instructions' names in the longest stretch that a branch jumps back over; with wgmma, in the shortest
    that has such an instruction."""
    names, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        if "@!PT" in line:      # never executed: the assembler's padding around asynchronous copies
            continue
        if code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", line):
            target = re.search(r"`\((\.L\w+)\)", code[2])
            if code[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(names) + 1))
            names.append("WARPGROUP.DEPBAR" if code[1].startswith("WARPGROUP.DEPBAR") else code[1].partition(".")[0])
    parts = sorted((names[begin:end] for begin, end in loops), key=len)
    return next((part for part in parts if "HGMMA" in part), parts[-1] if parts else [])


def main():
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({"begun": job}), flush=True)
        found = facts(compiled(**job), disassembled=job["kernel"] in ("fragment", "stream"))
        print(json.dumps({"job": job, "facts": found}), flush=True)


if __name__ == "__main__":
    main()
