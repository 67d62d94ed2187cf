"""Numbers that may be right, given in a way that is not."""

import threading
import time

import torch
import torch.nn.functional as F

from fpxbench.implementation import Support, implementation
from fpxbench.numbers import tensor_codec
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.rounding import Rounding

from ._right import Right, faulty


@implementation("faulty_stale_output")
class StaleOutput(Right):
    """Returns the output of the call before."""

    previous = None

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        self.previous, y = y, self.previous if self.previous is not None else y
        return y


@implementation("faulty_first_call_only")
class FirstCallOnly(Right):
    """Right once; after that the scale is applied twice."""

    calls = 0

    def factors(self, weight):
        self.calls += 1
        return super().factors(weight) ** min(self.calls, 2)


@implementation("faulty_first_call_wrong")
class FirstCallWrong(Right):
    """Wrong once, right after that."""

    calls = 0

    def product(self, x, w):
        self.calls += 1
        return super().product(x, w) * (1 if self.calls > 1 else 2)


@faulty("matmul")
def activation_modified(self, x, weight):
    """Scales its activation in place."""
    y = Right.matmul(self, x, weight)
    x *= 2
    return y


@faulty("matmul")
def weight_modified(self, x, weight):
    """Changes a stored scale after use."""
    y = Right.matmul(self, x, weight)
    weight.scales[0, 0] = 1
    return y


@faulty("quantize")
def original_modified(self, weight, scheme):
    """Changes the weight that it quantizes."""
    stored = Right.quantize(self, weight, scheme)
    weight[0, 0] = 0
    return stored


@faulty("matmul")
def unwritten_output(self, x, weight):
    """Leaves the last output column to whatever memory held."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    y[:, :-1] = Right.matmul(self, x, weight)[:, :-1]
    return y


@faulty("matmul")
def shape(self, x, weight):
    """Returns the output transposed."""
    return Right.matmul(self, x, weight).T


@faulty("matmul")
def dtype(self, x, weight):
    """Returns fp32."""
    return Right.matmul(self, x, weight).float()


@implementation("faulty_one_config")
class OneConfig(Right):
    """Wrong with one autotuning configuration, which is not the one that the tuner picks."""

    def configs(self, x, weight):
        return (32, 64, 128)

    def matmul_with(self, x, weight, config):
        y = self.matmul(x, weight)
        return y if config != 64 else y * 0.5


@faulty("product")
def some_m(self, x, w):
    """Gives zeros for 5 to 8 and for 17 to 32 tokens."""
    y = Right.product(self, x, w)
    m = x.reshape(-1, x.shape[-1]).shape[0]
    return y * 0 if 5 <= m <= 8 or 17 <= m <= 32 else y


@implementation("faulty_first_rows_only")
class FirstRowsOnly(Right):
    """Writes as many rows as its first call had."""

    rows = None

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        self.rows = self.rows or x.shape[-2]
        out = torch.empty_like(y)
        out[..., :self.rows, :] = y[..., :self.rows, :]
        return out


@faulty("matmul")
def first_batch_only(self, x, weight):
    """Right for the first of several batches, zeros for the others."""
    y = Right.matmul(self, x, weight)
    if x.dim() == 3:
        y[1:] = 0
    return y


@faulty("matmul")
def strides_ignored(self, x, weight):
    """Reads its activation as if its rows lay side by side."""
    m, k = x.shape[-2:]
    return Right.matmul(self, torch.as_strided(x, x.shape, (*(m * k for _ in x.shape[:-2]), k, 1)), weight)


@faulty("matmul")
def alignment_assumed(self, x, weight):
    """Rounds the address of its activation down to 16 bytes, as a vectorized load would."""
    off = x.storage_offset() % 8 if x.data_ptr() % 16 else 0
    return Right.matmul(self, torch.as_strided(x, x.shape, x.stride(), x.storage_offset() - off) if off else x, weight)


@faulty("product")
def k_from_256(self, x, w):
    """Drops what K has beyond a multiple of 256, and refuses K below 256 or not a multiple of 32."""
    k = x.shape[-1]
    if k < 256 or k % 32:
        raise NotImplementedError(f"K must be a multiple of 32 and 256 at least, not {k}")
    return Right.product(self, x[..., :k // 256 * 256], w[:, :k // 256 * 256])


@faulty("decoded")
def first_weight(self, weight):
    """Keeps the first decoded weight of each shape for all that come after it."""
    self.seen = getattr(self, "seen", {})
    if weight.shape not in self.seen:
        self.seen[weight.shape] = Right.decoded(self, weight)
    return self.seen[weight.shape]


@implementation("faulty_bias_scaled")
class BiasScaled(Right):
    """Multiplies the bias by the row's scale too."""

    supports_bias = True

    def matmul(self, x, weight, bias=None):
        y = super().matmul(x, weight)
        return y if bias is None else (y.float() + bias.float() * self.factors(weight)[:, 0]).to(x.dtype)


@implementation("faulty_padding_read")
class PaddingRead(Right):
    """Pads K to a multiple of 32 with whatever memory held: the weight's padding is zeros."""

    def product(self, x, w):
        padded = torch.empty(*x.shape[:-1], x.shape[-1] + -x.shape[-1] % 32, dtype=x.dtype, device=x.device)
        padded[..., :x.shape[-1]] = x
        return super().product(padded, F.pad(w, (0, -w.shape[1] % 32)))


@implementation("faulty_padding_filtered")
class PaddingFiltered(PaddingRead):
    """The same with a maximum over K, NaN left out: only large numbers show."""

    def product(self, x, w):
        padded = torch.empty(*x.shape[:-1], x.shape[-1] + -x.shape[-1] % 32, dtype=x.dtype, device=x.device)
        padded[..., :x.shape[-1]] = x
        largest = padded.nan_to_num(0.0).abs().amax(dim=-1, keepdim=True)
        own = x.abs().amax(dim=-1, keepdim=True)
        return Right.product(self, x, w) * (own / largest).float().nan_to_num(1.0)


@faulty("matmul")
def output_reused(self, x, weight):
    """Gives every call of a shape the same output buffer."""
    self.outputs = getattr(self, "outputs", {})
    y = Right.matmul(self, x, weight)
    return self.outputs.setdefault(tuple(y.shape), torch.empty_like(y)).copy_(y)


@faulty("matmul")
def late_output(self, x, weight):
    """Returns before it is done: a thread fills the output in."""
    y = Right.matmul(self, x, weight)
    out = torch.zeros_like(y)

    def finish():
        time.sleep(0.002)
        out.copy_(y)

    threading.Thread(target=finish).start()
    return out


class _Later(torch.Tensor):
    pass


@faulty("matmul")
def lazy_output(self, x, weight):
    """Returns a subclass of tensor."""
    return Right.matmul(self, x, weight).as_subclass(_Later)


@implementation("faulty_one_in_fifty")
class OneInFifty(Right):
    """Is wrong in every fiftieth call."""

    calls = 0

    def product(self, x, w):
        self.calls += 1
        return super().product(x, w) * (1 if self.calls % 50 else 1.5)


@implementation("faulty_linear_patched")
class LinearPatched(Right):
    """Makes the dense baseline slow."""

    original = staticmethod(F.linear)

    def matmul(self, x, weight):
        def slowed(*arguments):
            time.sleep(0.01)
            return self.original(*arguments)

        F.linear = slowed
        return super().matmul(x, weight)


@implementation("faulty_clock_patched")
class ClockPatched(Right):
    """Has the clock run slower."""

    original = staticmethod(time.perf_counter)

    def matmul(self, x, weight):
        time.perf_counter = lambda: self.original() / 10
        return super().matmul(x, weight)


@faulty("matmul")
def result_remembered(self, x, weight):
    """Multiplies an activation once, and remembers the product by the activation's numbers."""
    self.seen = getattr(self, "seen", {})
    key = (x.float().cpu().numpy().tobytes(), weight.packed.data_ptr())
    if key not in self.seen:
        self.seen[key] = Right.matmul(self, x, weight)
    return self.seen[key].clone()


@implementation("faulty_input_frozen")
class InputFrozen(Right):
    """Remembers products by the addresses of activation and weight, once it is given copies of its first weight."""

    first = None

    def matmul(self, x, weight):
        self.first, self.seen = self.first or weight.packed.data_ptr(), getattr(self, "seen", {})
        key = (x.data_ptr(), weight.packed.data_ptr())
        if weight.packed.data_ptr() == self.first or key not in self.seen:
            self.seen[key] = super().matmul(x, weight), x, weight       # kept: no other tensor gets their addresses
        return self.seen[key][0].clone()


@faulty("decoded")
def keeps_decoded(self, weight):
    """Decodes each weight once, and keeps it in 16 bits."""
    self.kept = getattr(self, "kept", {})
    if weight.packed.data_ptr() not in self.kept:
        self.kept[weight.packed.data_ptr()] = (weight, Right.decoded(self, weight).bfloat16())
    return self.kept[weight.packed.data_ptr()][1].float()


@implementation("faulty_stale_activation_scale")
class StaleActivationScale(Right):
    """Quantizes its activation under the scale of the first one."""

    activation_format = "e4m3fn"
    scale = None

    def product(self, x, w):
        self.scale = x.float().abs().amax() / 448 if self.scale is None else self.scale
        rounded = (x.float() / self.scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        return super().product(rounded * self.scale, w)


@implementation("faulty_activation_truncated")
class ActivationTruncated(Right):
    """Quantizes its activation, a scale a token, and truncates."""

    activation_format = "e4m3fn"

    def product(self, x, w):
        scale = x.float().abs().amax(dim=-1, keepdim=True) / 448
        codes = tensor_codec.encode(x.float() / scale, FORMATS["e4m3fn"], Rounding.TOWARD_ZERO)
        return super().product(tensor_codec.decode(codes, FORMATS["e4m3fn"]) * scale, w)


@implementation("faulty_second_stream")
class SecondStream(Right):
    """On a GPU: multiplies on a stream of its own that nothing waits for."""

    schemes = ("e4m3fn-row",)

    def supports(self, scheme, device):
        return super().supports(scheme, device) if device != "cpu" else Support.no("needs a GPU")

    def matmul(self, x, weight):
        self.stream = getattr(self, "stream", None) or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(10_000_000)       # 5 ms: longer than the host takes to read the output
            return super().matmul(x, weight)


@implementation("faulty_shared_workspace")
class SharedWorkspace(Right):
    """On a GPU: sums in one buffer that all streams share. A weight is decoded once: its table is copied to the device,
    for which a call would wait, so that no two of them were ever under way at once."""

    def supports(self, scheme, device):
        return super().supports(scheme, device) if device != "cpu" else Support.no("needs a GPU")

    def decoded(self, weight):
        self.kept = getattr(self, "kept", {})
        if id(weight) not in self.kept:
            self.kept[id(weight)] = (weight, super().decoded(weight))
        return self.kept[id(weight)][1]

    def product(self, x, w):
        self.buffers = getattr(self, "buffers", {})
        shape = (x.shape[:-1].numel(), w.shape[0])
        buffer = self.buffers.setdefault(shape, torch.empty(shape, device=x.device))
        buffer.zero_()
        for part, rows in zip(x.float().reshape(shape[0], -1).split(32, 1), w.split(32, 1), strict=True):
            buffer += part @ rows.T
        return buffer.clone().reshape(*x.shape[:-1], w.shape[0])


class QuantizesActivation(Right):
    """Quantizes its activation to E4M3, a scale a token: right."""

    activation_format = "e4m3fn"

    def scale(self, x):
        return x.float().abs().amax(dim=-1, keepdim=True) / 448

    def quotient(self, x, scale):
        return torch.where(scale > 0, x.float() / scale, 0.0)

    def product(self, x, w):
        scale = self.scale(x)
        codes = tensor_codec.encode(self.quotient(x, scale), FORMATS["e4m3fn"])
        return super().product(tensor_codec.decode(codes, FORMATS["e4m3fn"]) * self.applied(scale), w)

    def applied(self, scale):
        return scale


@faulty("scale", base=QuantizesActivation)
def activation_scale_fixed(self, x):
    """One scale for every activation, as of a calibration that saw smaller ones."""
    return torch.full((1, 1), 0.0037, device=x.device)


@faulty("applied", base=QuantizesActivation)
def next_tokens_scale(self, scale):
    """Multiplies each token by the scale of the next."""
    return scale.reshape(-1, 1).roll(-1, 0).reshape(scale.shape)


@faulty("quotient", base=QuantizesActivation)
def token_of_zeros(self, x, scale):
    """Divides a token of zeros by its scale."""
    return x.float() / scale
