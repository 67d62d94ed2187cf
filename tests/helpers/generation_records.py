"""Records of a model's rows, as `fpxbench generate` stores them."""

from sample_records import BUILD, CPU

from fpxbench.model.generate_record import (
    Divergence,
    Estimate,
    GenerationRecord,
    LayerDiagnosis,
    LayerDifference,
    ModelDescription,
    Speed,
    TextQuality,
    traffic_of,
)
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

MODEL = ModelDescription(name="tiny", kind="folder", architecture="LlamaForCausalLM", layers=2, parameters=1_000_000,
                         bytes=2_000_000, note="A model of a test.")
HOSTILE = "<script>alert(1)</script>"


def estimate(value):
    return Estimate(value=value, low=value * 0.9, high=value * 1.1)


def divergence(mean):
    return Divergence(mean=estimate(mean), median=estimate(mean / 2), p99=estimate(mean * 9), maximum=mean * 20)


def quality(kl):
    return TextQuality(text="water.txt", tokens=255, perplexity=estimate(20 + kl), kl=divergence(kl),
                       kl_format=divergence(kl), kl_kernel=divergence(1e-4), noise=divergence(1e-4), threshold=1e-3,
                       same_top=estimate(0.9), right_token_change=estimate(-0.01))


def row(scheme, mb, step_s, kl, implementation="cpu_fused", **changes):
    traffic, flags = traffic_of(int(mb * 1e6), int(mb * 1e6), step_s, CPU)
    speed = Speed(step_s=[step_s] * 6, tokens_per_s=1 / step_s, tokens_per_s_ci95=(0.9 / step_s, 1.1 / step_s),
                  first_token_s=estimate(0.1), prefill_tokens_per_s=100.0)
    return GenerationRecord(**dict(
        model=MODEL, scheme=scheme, implementation=implementation, build=BUILD, machine=CPU, prompt="Water is",
        verdict=Verdict(status=Status.OK), quality=[quality(kl)], speed=speed, traffic=traffic, flags=flags,
        layers=[LayerDifference(layer=f"layers.{n}", relative=1e-3, noise=1e-3, leaves=False) for n in range(4)],
        sample="wet") | changes)


def wrong(scheme="e4m3fn-row", implementation="fn_as_fnuz", **changes):
    verdict = Verdict(status=Status.WRONG, kind=Kind.GIBBERISH, summary="KL divergence 9 from the same codes")
    return row(scheme, 100, 0.02, 9.0, implementation, **(dict(
        verdict=verdict, speed=None, traffic=None, sample=HOSTILE,
        diagnosis=LayerDiagnosis(layer="layers.0", kind=Kind.FN_AS_FNUZ, message="reads FN as FNUZ")) | changes))
