"""What a captured step is made of: its parts add up to it."""

import pytest
from generation_records import row

from fpxbench.model.generate_record import StepParts
from fpxbench.model.step_profile import KernelSpan, kind_of, of_graph, parts_of
from fpxbench.reports.model.generation_charts import charts_of
from fpxbench.reports.model.generation_table import model_page

ATTENTION = "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_3_64x64x128"


@pytest.mark.parametrize(("name", "kind"), [
    ("fragment_kernel", "products"), ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_splitK_TNT", "products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", "products"), ("triton_tem_fused_mm_3", "products"),
    ("triton_red_fused__to_copy_mm_t_0", "products"), ("order_kernel", "products"), (ATTENTION, "attention"),
    ("void pytorch_flash::flash_fwd_splitkv_kernel<>", "attention"),
    ("triton_red_fused__to_copy_add_mean_mul_5", "between"),
    ("triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_bmm_2", "between"),
    ("triton_red_fused_add_bmm_mean_mm_mul_pow_rsqrt_4", "between"),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_tn_align1>", "between"),
    ("triton_poi_fused_linear_mul_silu_6", "between"), ("Memcpy DtoD (Device -> Device)", "between"),
    ("void at::native::vectorized_elementwise_kernel<4>", "between"),
])
def test_a_kernel_belongs_to_a_part_by_its_name(name, kind):
    assert kind_of(name) == kind


def test_parts_add_up_to_the_step_and_kernels_that_overlap_count_once():
    spans = [KernelSpan("Memcpy DtoD", 0, 1), KernelSpan("triton_red_fused_mean_0", 50, 52),
             KernelSpan("fragment_kernel", 52.5, 60), KernelSpan("triton_poi_fused_add_1", 59, 62),
             KernelSpan("triton_poi_fused_add_1", 60, 61), KernelSpan(ATTENTION, 63, 70)]
    parts = parts_of([of_graph(spans)] * 3)
    assert (parts.products_us, parts.attention_us, parts.between_us, parts.gaps_us) == (7.5, 7, 4, 1.5)
    assert sum(each.us for each in parts.kernels) == pytest.approx(70 - 50 - 1.5)
    assert [(each.name, each.count) for each in parts.kernels][0] == ("fragment_kernel", 1)
    assert next(each for each in parts.kernels if "poi" in each.name).count == 2
    assert parts_of([]) is None and parts_of([of_graph(spans[:1])]) is None


def test_the_parts_of_captured_rows_are_drawn_and_of_others_nothing():
    parts = StepParts(products_us=60, attention_us=6, between_us=8, gaps_us=2)
    rows = [row("bf16", 270, 0.02, 0.0, "plain"), row("mxfp4", 80, 0.01, 0.5, step=parts)]
    chart = next(each for each in charts_of(model_page(("gpu", "b"), rows).tables[0], 0) if each.name == "parts-0")
    assert [(trace["name"], trace["x"]) for trace in chart.figure["data"]] == [
        ("products", [0.06]), ("attention", [0.006]), ("other kernels", [0.008]), ("no kernel", [0.002])]
    assert all("KL" in label for trace in chart.figure["data"] for label in trace["y"])
    assert not [each for each in charts_of(model_page(("gpu", "b"), rows[:1]).tables[0], 0) if each.name == "parts-0"]
