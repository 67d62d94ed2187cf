"""Read metadata of a compiled kernel from its object and its assembly."""

import re
import struct
import subprocess
import tempfile

# Names of matrix instructions, in full if they multiply by block scales.
_MATRIX = (r"wgmma\.mma_async|tcgen05\.mma(?:[\w.:]*kind::mx\w+)?|mma\.sync(?:[\w.:]*block_scale)?"
           r"|v_mfma_scale|v_s?mfmac?|v_s?wmmac?")
# Their small operand types, which are in the instruction's name.
_SMALL = r"(?:e4m3|e5m2|e2m1|e3m2|e2m3)"
_MATRIX_TYPES = (r"mma[\w.:]*\.(" + _SMALL + r"\." + _SMALL + r")\b"
                 r"|(?:v_s?mfmac?|v_s?wmmac?)_\w*?([fb][pf]8(?:_[fb][pf]8)?)\b")
_CONVERSIONS = r"\bcvt(?:\.\w+)*\.(?:e4m3|e5m2|e2m1|e3m2|e2m3|ue8m0)\w*(?:\.\w+)*|\bv_cvt_\w*(?:fp8|bf8|fp4|fp6|bf6)\w*"
_LOADS = r"ld\.global[.\w:]*|(?:global|buffer|flat)_load_\w+"


def of(kernel, backend, assembly, disassembler):
    """Return metadata of `kernel`, with its ``assembly`` if requested, and its ``sass`` opcodes if there is a
    `disassembler`.

    ``object_bytes`` is 0 if the object is not an ELF file.
    """
    text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    binary = kernel.asm["cubin" if backend == "cuda" else "hsaco"]
    found = {
        "object_bytes": len(binary) if binary[:4] == b"\x7fELF" else 0,
        "shared_bytes": kernel.metadata.shared,
        "matrix": _counted(_MATRIX, text),
        "matrix_types": sorted({ptx or amd for ptx, amd in re.findall(_MATRIX_TYPES, text)}),
        "conversions": _counted(_CONVERSIONS, text),
        "load_bits": _load_bits(text),
    }
    found.update(_of_cubin(binary) if backend == "cuda" else _of_amdgcn(text))
    if assembly:
        found["assembly"] = _instructions_only(text, backend)
    if backend == "cuda" and disassembler and found["object_bytes"]:
        found["sass"] = _sass_opcodes(binary, disassembler)
    return found


def _counted(pattern, text):
    counts = {}
    for name in re.findall(pattern, text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _load_bits(text):
    """Return the widest load from global memory, in bits per thread; None if none is recognised."""
    return max((_width(load) for load in re.findall(_LOADS, text)), default=None)


def _width(load):
    if load.startswith("ld."):
        vector = re.search(r"\.v(\d)", load)
        return int(vector[1] if vector else 1) * int(re.search(r"\.[busf](\d+)$", load)[1])
    for name, bits in (("dwordx4", 128), ("b128", 128), ("dwordx3", 96), ("b96", 96), ("dwordx2", 64), ("b64", 64),
                       ("dword", 32), ("b32", 32), ("short", 16), ("16", 16), ("byte", 8), ("8", 8)):
        if name in load:
            return bits
    return 0


def _of_amdgcn(text):
    """Return numbers from the metadata that LLVM writes below a kernel."""
    numbers = {}
    for name, pattern in (("registers", r"^\s*\.vgpr_count:\s*(\d+)"), ("spills", r"^\s*\.vgpr_spill_count:\s*(\d+)"),
                          ("stack_bytes", r"^\s*\.private_segment_fixed_size:\s*(\d+)")):
        match = re.search(pattern, text, re.MULTILINE)
        if match:
            numbers[name] = int(match[1])
    return numbers


def _of_cubin(binary):
    """Return registers and stack from the ``.nv.info`` section: attributes 0x2f (register count) and 0x11 (frame size).

    A frame is a thread's local memory: spills, and arrays that are indexed at run time.
    """
    if binary[:4] != b"\x7fELF":
        return {}
    numbers = {}
    for name, content in _sections(binary):
        if name == ".nv.info":
            at = 0
            while at + 4 <= len(content):
                form, attribute, size = struct.unpack_from("<BBH", content, at)
                at += 4
                if form == 4:
                    if size == 8 and attribute in (0x2F, 0x11):
                        value = struct.unpack_from("<I", content, at + 4)[0]
                        field = "registers" if attribute == 0x2F else "stack_bytes"
                        numbers[field] = max(value, numbers.get(field, 0))
                    at += size
    return numbers


def _sections(binary):
    """Yield name and content of each section of a 64-bit little-endian ELF file."""
    (offset,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", binary, offset + i * size) for i in range(count)]
    strings = headers[names][4]
    for name, kind, _, _, at, length in headers:
        end = binary.index(b"\0", strings + name)
        yield binary[strings + name:end].decode(), b"" if kind == 8 else binary[at:at + length]


def _instructions_only(text, backend):
    """Return the kernel's own lines, without comments, debugging sections and metadata."""
    if backend == "cuda":
        text = text.split(".section", 1)[0]
        text = re.sub(r"//[^\n]*", "", text)
        return "\n".join(line.strip() for line in text.splitlines() if line.strip()
                         and not re.match(r"\s*\.(loc|file)\b", line))
    body = re.search(r"^\w+:\s*; @\w+.*?(?=^\s*\.section)", text, re.DOTALL | re.MULTILINE)
    lines = (line.split(";")[0].strip() for line in (body[0] if body else text).splitlines())
    return "\n".join(line
        for line in lines if line and not re.match(r"\.(loc|file|cfi_\w+|p2align|type|globl|protected)\b", line))


def _sass_opcodes(cubin, disassembler):
    """Return how often each machine instruction occurs; None if the disassembler rejects the object."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([disassembler, "-c", file.name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             timeout=60)
    if run.returncode:
        return None
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", run.stdout.decode(errors="replace"))
    counts = {}
    for name in names:
        if not name.startswith(("NOP", "BRA")):
            counts[name] = counts.get(name, 0) + 1
    return counts
