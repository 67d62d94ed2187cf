"""Let `torch.compile` write the code of a weight-only product for a GPU that need not be present, and compile it.

Substitutes answer Inductor's queries of the GPU, so that this needs a process of its own. It uses private names of
PyTorch; a missing one raises `NotObservable`. Nothing is timed: of the ways to multiply the first Triton template is
taken, and everything is fused that Inductor may fuse.
"""

import ast
import contextlib
import gc
import importlib
import importlib.util
import os
import sys
import tempfile
import types

DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "e4m3fn": "float8_e4m3fn", "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2": "float8_e5m2",
    "e5m2fnuz": "float8_e5m2fnuz", "int8": "int8",
}
PRIVATE = (
    "torch._inductor.compile_fx.compile_fx_inner", "torch._inductor.config.patch",
    "torch._inductor.decomposition.select_decomp_table",
    "torch._inductor.graph.GraphLowering.codegen", "torch._inductor.graph.GraphLowering.compile_to_module",
    "torch._inductor.list_mode_options", "torch._inductor.runtime.triton_helpers.set_driver_to_gpu",
    "torch._inductor.runtime.triton_heuristics.CachingAutotuner",
    "torch._inductor.select_algorithm.add_preprocessing_fn",
    "torch._dynamo.device_interface.CudaInterface.Worker", "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.fx.experimental.proxy_tensor.make_fx", "triton.runtime.driver.set_active",
)
"""Private names of PyTorch and Triton that are used here."""

ROLES = {"w": "upcast", "x": "product", "s": "scale"}
"""What a launch with that argument of the function does, in order."""
_PROCESSORS = 108
"""Multiprocessors of the substitute, an A100's for every architecture, so that only the architecture selects kernels.
"""


class NotObservable(Exception):
    """This PyTorch's code cannot be observed; the message says why."""

    def __init__(self, why):
        super().__init__("not observable on this build: " + why)


def prepare(request):
    """Import what takes seconds, once; `compiled` raises any error."""
    # A GPU that is present would be queried instead of the substitute.
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", TORCHINDUCTOR_COMPILE_THREADS="1")
    with contextlib.suppress(Exception):
        for name in PRIVATE:
            _found(name)
        for name in ("lowering", "codegen.triton", "kernel.mm", "fx_passes.post_grad", "fx_passes.joint_graph"):
            importlib.import_module("torch._inductor." + name)
        sys.modules["torch._inductor.codegen.common"].init_backend_registration()
    gc.freeze()     # else every fork's collector visits, and thereby copies, all imported objects


def compiled(request):
    """Return the launches of the request's product, with metadata of the kernels that Inductor wrote.

    ``inductor`` of a request: ``weight`` (its dtype), ``x`` (the activation's), ``layout`` (``nk``: a weight [N, K]
    that is multiplied transposed; ``kn``: [K, N]), ``m``, ``n``, ``k``, ``mode`` (torch.compile's). ``backend``,
    ``arch`` and ``warp_size`` are the GPU. With ``stored`` (an fp8 dtype), ``rows`` and ``columns`` instead of
    ``weight`` and so on, the function is a quantizer that stores twice, and every configuration of its kernel is
    compiled.
    """
    import kernel_metadata

    wrapper = generated(request)
    if "stored" in request["inductor"]:
        return {"store": _compiled_store(wrapper, request)}
    launches = launches_of(wrapper)
    for launch in launches:
        if launch["by"] == "triton":
            kernel, config = built(launch["kernel"], kernels_of(wrapper)[launch["kernel"]], request)
            launch["metadata"] = kernel_metadata.of(kernel, request["backend"], launch["does"] == ["upcast"], None)
            launch["block"] = {"threads": config.num_warps * request["warp_size"], **config.kwargs}
    return {"launches": launches}


def generated(request):
    """Return the source of Inductor's module for the request. Raises NotObservable, or what Inductor raises."""
    _torch()
    try:
        found = {name: _found(name) for name in PRIVATE}
        _stand_in(request)
        return _lowered(request["inductor"], found)
    except Exception as error:
        why = _own_fault(error)
        if why:
            raise NotObservable(f"{_version()} ({why})") from error
        raise


def launches_of(wrapper):
    """Return the module's launches in order: ``by`` (``triton``, or a function's name), ``kernel``, and what it
    ``does``.
    """
    call = _call_of(wrapper)
    kernels = kernels_of(wrapper)
    does = {name.id: ROLES[argument] for name, argument in zip(_unpacked(call).targets[0].elts, "xws")}  # noqa: B905
    launches = []
    calls = [node for node in ast.walk(call) if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        by = ast.unparse(node.func)
        kernel = by[:-len(".run")]
        if not (by.startswith(("extern_kernels.", "torch.ops.", "aten.")) or by.endswith(".run") and kernel in kernels):
            continue
        names = {name.id for argument in [*node.args, *(word.value for word in node.keywords)]
                 for name in ast.walk(argument) if isinstance(name, ast.Name)}
        launch = {"by": "triton", "kernel": kernel} if kernel in kernels else {"by": by}
        launches.append({**launch,
                         "does": [role for role in ROLES.values() if role in {does.get(name) for name in names}]})
    left = [role for role in ROLES.values() if not any(role in launch["does"] for launch in launches)]
    if left:
        raise NotObservable(f"in the module of {_version()}, no known launch does the {' and '.join(left)}")
    return launches


def _call_of(wrapper):
    """Return the module's function ``call(args)``. Raises NotObservable."""
    calls = [node for node in ast.walk(ast.parse(wrapper)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if not calls or _unpacked(calls[0]) is None:
        raise NotObservable(_version() + " writes no function `call(args)`")
    return calls[0]


def _unpacked(call):
    """Return the assignment of ``args`` to the arguments' names, or None."""
    return next((node for node in ast.walk(call) if isinstance(node, ast.Assign)
                 and isinstance(node.targets[0], ast.Tuple)
                 and isinstance(node.value, ast.Name) and node.value.id == "args"), None)


def store_of(wrapper):
    """Return name and arguments of the kernel, if the module launches only one; else None.

    An argument is ``x`` or ``s``, an integer, or the strides of an output (of ``out`` or ``transposed``).
    """
    call = _call_of(wrapper)
    kernels = kernels_of(wrapper)
    runs = [node for node in ast.walk(call) if isinstance(node, ast.Call)
            and ast.unparse(node.func) in {name + ".run" for name in kernels}]
    if len(runs) != 1:
        return None
    buffers = {node.targets[0].id: ast.literal_eval(node.value.args[1]) for node in ast.walk(call)
               if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
               and ast.unparse(node.value.func).startswith("empty_strided")}
    returned = next(node.value for node in ast.walk(call) if isinstance(node, ast.Return))
    outputs = dict(zip([ast.unparse(name) for name in returned.elts], ("out", "transposed")))  # noqa: B905
    inputs = dict(zip([name.id for name in _unpacked(call).targets[0].elts], "xs"))  # noqa: B905
    arguments = []
    for node in runs[0].args:
        text = ast.unparse(node)
        if isinstance(node, ast.Constant):
            arguments.append(node.value)
        elif text in inputs:
            arguments.append(inputs[text])
        elif text in outputs and text in buffers:
            arguments.append({outputs[text]: list(buffers[text])})
        else:       # the result of PyTorch's own cast
            return None
    return ast.unparse(runs[0].func)[:-len(".run")], arguments


def _compiled_store(wrapper, request):
    """Return the arguments, and the metadata of each configuration that Inductor or its coordinate descent may choose.
    """
    import kernel_metadata

    found = store_of(wrapper)
    if found is None:
        return {"arguments": [], "configs": []}
    name, arguments = found
    tuner = _tuner(name, kernels_of(wrapper)[name])
    configs = {}
    for config in tuner.configs:
        for warps in (config.num_warps // 2, config.num_warps, config.num_warps * 2):
            if 1 <= warps <= 16:
                configs.setdefault((*sorted(config.kwargs.items()), warps), (config, warps))
    found = []
    for config, warps in configs.values():
        about = {"num_warps": warps, **config.kwargs}
        try:
            kernel = _compiled_kernel(tuner, request, config.kwargs, warps, config.num_stages)
            about["metadata"] = kernel_metadata.of(kernel, request["backend"], True, None)
        except Exception as error:
            about["raised"] = [type(error).__name__, str(error)[-2000:]]
        found.append(about)
    return {"arguments": arguments, "configs": found}


def kernels_of(wrapper):
    """Return the sources of the module's Triton kernels by name."""
    return {
        node.targets[0].id: node.value.args[1].value for node in ast.walk(ast.parse(wrapper))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "async_compile.triton"
    }


def _torch():
    if importlib.util.find_spec("torch") is None:
        raise NotObservable("no PyTorch beside its Triton")


def _version():
    return "PyTorch " + getattr(sys.modules.get("torch"), "__version__", "of an unknown version")


def _found(name):
    """Return the object of that dotted name."""
    parts = name.split(".")
    owner = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        if not hasattr(owner, part):
            with contextlib.suppress(ImportError):
                importlib.import_module(".".join(parts[:at]))
        if not hasattr(owner, part):
            whose = _version() if parts[0] == "torch" else "its Triton"
            raise NotObservable(f"{whose} has no {name}")
        owner = getattr(owner, part)
    return owner


def _stand_in(request):
    """Answer Inductor's queries of the GPU for the request's architecture."""
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    hip, arch = request["backend"] == "hip", request["arch"]
    major, minor = (int(arch[3:-2]), int(arch[-2], 16)) if hip else divmod(arch, 10)
    properties = types.SimpleNamespace(
        name=str(arch), major=major, minor=minor, gcnArchName=str(arch), warp_size=request["warp_size"],
        multi_processor_count=_PROCESSORS,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        total_memory=80 << 30,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=64 << 10 if hip else 99 << 10,
    )
    # PyTorch for NVIDIA and for AMD are two builds, distinguished by these.
    torch.version.hip, torch.version.cuda = ("7.0", None) if hip else (None, "13.0")
    queries = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor), "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None, "get_rng_state": lambda device=None: torch.empty(0),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, answer in queries.items():
        setattr(torch.cuda, name, answer)
        for owner in (CudaInterface, CudaInterface.Worker):
            if hasattr(owner, name):
                setattr(owner, name, staticmethod(answer))
    target = GPUTarget(request["backend"], arch, request["warp_size"])
    driver.set_active(types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
        utils=types.SimpleNamespace(get_device_properties=lambda device: {
            "max_shared_mem": properties.shared_memory_per_block_optin,
                                                                         "multiprocessor_count": _PROCESSORS}),
    ))
    # The first fake tensor would initialise the GPU, and each kernel's source begins with a search for one.
    fake_tensor.init_gpu_context = lambda device: None
    triton_helpers.set_driver_to_gpu = lambda: None


class _Generated(BaseException):
    """The module is written: leave before it is compiled and run."""


def _lowered(options, found):
    import torch
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.gettempdir()
    function, sizes = _quantizer(options) if "stored" in options else _product(options)

    def written(graph):
        raise _Generated(graph.codegen()[0].value)

    GraphLowering.compile_to_module = written
    found["torch._inductor.select_algorithm.add_preprocessing_fn"](_first_template)
    with found["torch._subclasses.fake_tensor.FakeTensorMode"]():
        arguments = [torch.empty(size, dtype=dtype, device="cuda:0") for size, dtype in sizes]
    # Graphs of launches would move what is launched out of `call`.
    settings = dict(torch._inductor.list_mode_options(options["mode"])) | {"fx_graph_cache": False,
                                                                        "triton.cudagraphs": False}
    if hasattr(getattr(config, "test_configs", None), "max_mm_configs"):
        settings["test_configs.max_mm_configs"] = 1      # only the first is taken anyway: half the time
    with config.patch(settings), torch.no_grad():
        graph = found["torch.fx.experimental.proxy_tensor.make_fx"](
            function, decomposition_table=found["torch._inductor.decomposition.select_decomp_table"]())(*arguments)
        try:
            found["torch._inductor.compile_fx.compile_fx_inner"](graph, arguments)
        except _Generated as generated:
            return generated.args[0]
    raise NotObservable(_version() + " compiles a graph without GraphLowering.compile_to_module")


def _product(options):
    """Return a weight-only product, and the sizes and dtypes of its arguments."""
    import torch

    x, weight = getattr(torch, DTYPES[options["x"]]), getattr(torch, DTYPES[options["weight"]])
    transposed = options["layout"] == "nk"

    def product(x, w, s):
        w = w.to(x.dtype)
        return (torch.mm(x, w.t() if transposed else w) * s,)

    shape = (options["n"], options["k"]) if transposed else (options["k"], options["n"])
    return product, [((options["m"], options["k"]), x), (shape, weight), ((options["n"],), x)]


def _quantizer(options):
    """Return a function that scales rows, clamps and casts, and returns the codes and a transposed copy of them."""
    import torch

    stored = getattr(torch, DTYPES[options["stored"]])
    high = torch.finfo(stored).max

    def quantizer(x, s):
        codes = (x.float() * s).clamp(-high, high).to(stored)
        return codes, torch.clone(codes.t(), memory_format=torch.contiguous_format)

    return quantizer, [((options["rows"], options["columns"]), torch.bfloat16), ((options["rows"], 1), torch.float32)]


def _first_template(choices):
    """Return the first Triton template of the ways to multiply that a GPU would time against each other, else the
    first.
    """
    return ([choice for choice in choices if choice.name.startswith("triton")] or choices)[:1]


def _own_fault(error):
    """Return the error of a substitute or of a private function's call that caused `error`; empty if there is none."""
    while error is not None:
        message = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, (AttributeError, TypeError, ImportError)) or "CUDA" in message:
            return f"{type(error).__name__}: {message}"
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return ""


def built(name, source, request):
    """Compile one of the module's kernels in its first configuration; return both. Raises what the compiler raises."""
    tuner = _tuner(name, source)
    config = tuner.configs[0]
    return _compiled_kernel(tuner, request, config.kwargs, config.num_warps, config.num_stages), config


def _tuner(name, source):
    """Load a kernel's source, and return its ``CachingAutotuner``."""
    path = os.path.join(tempfile.gettempdir(), name + ".py")      # Triton reads a kernel from its file
    with open(path, "w", encoding="utf-8") as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _compiled_kernel(tuner, request, blocks, num_warps, num_stages):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        names, signature = tuner.fn.arg_names, tuner.triton_meta["signature"]
        constants = tuner.triton_meta["constants"] | blocks
        attrs, = tuner.triton_meta["configs"]
    except (AttributeError, KeyError, ValueError) as error:
        raise NotObservable(f"{_version()} has another form of kernel ({type(error).__name__}: {error})") from error
    source = ASTSource(tuner.fn, {name: "constexpr" if name in constants else signature[name] for name in names},
                       constexprs=constants, attrs=attrs)
    target = GPUTarget(request["backend"], request["arch"], request["warp_size"])
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
