"""The CPU tests of the kernels on a GPU: their bodies, unchanged, on the backends that run there.

One command on a GPU node checks everything and leaves a summary to commit:
    pytest tests/gpu --gpu-summary benchmarks/results/gpu_tests_<GPU>.json
Without a GPU they are skipped; TULU_HPC_GPU_REHEARSAL=1 runs them on the CPU to try this file.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.moved import REHEARSAL, replace
from tests.kernels import linear_logprob_cases, policy_cases
from tests.kernels import test_gae as gae
from tests.kernels import test_linear_logprob as linear
from tests.kernels import test_linear_logprob_products as linear_products
from tests.kernels import test_linear_logprob_triton as linear_triton
from tests.kernels import test_packed_attention as attention
from tests.kernels import test_packed_attention_parts as attention_parts
from tests.kernels import test_packed_attention_triton as attention_triton
from tests.kernels import test_policy_loss as policy_loss
from tests.kernels import test_preference_loss as preference_loss
from tests.kernels import test_rope as rope
from tests.kernels import test_value_loss as value_loss
from tulu_hpc.kernels import build_info
from tulu_hpc.kernels.packed_attention import flash
from tulu_hpc.kernels.packed_attention.providers import PROVIDERS
from tulu_hpc.kernels.packed_attention.select import refusal

LOSSES = {"cpu": "triton"}
gemms = linear_products.gemms  # a fixture
small_tiles = attention_triton.small_tiles  # a fixture of its tests, which find the GPU themselves


@pytest.fixture(autouse=True, scope="module")
def _on_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear_logprob_cases, linear, linear_products):
            replace(patch, module, ["linear_logprob"], {"cpu": "cuda"})
        replace(patch, attention, ["packed_attention", "plan_attention"], {"cpu": "triton"})
        replace(patch, preference_loss, ["preference_loss"], LOSSES)
        for module in (policy_cases, policy_loss):
            replace(patch, module, ["policy_loss"], LOSSES)
        replace(patch, gae, ["gae"], LOSSES)
        replace(patch, value_loss, ["value_loss"], LOSSES)
        replace(patch, rope, ["rope"], {})
        yield


class TestLinearLogprob:
    test_against_the_definition = staticmethod(linear.test_against_the_definition)
    test_extreme_logits = staticmethod(linear.test_extreme_logits)
    test_equal_and_one_hot_logits = staticmethod(linear.test_equal_and_one_hot_logits)
    test_empty_ignored_and_single = staticmethod(linear.test_empty_ignored_and_single)
    test_many_equal_targets_of_one_row_add_up = staticmethod(linear.test_many_equal_targets_of_one_row_add_up)
    test_strided_and_expanded_inputs = staticmethod(linear.test_strided_and_expanded_inputs)
    test_bf16_operands_give_fp32_results = staticmethod(linear.test_bf16_operands_give_fp32_results)
    test_bf16_weight_gradient_is_accumulated_in_fp32 = staticmethod(
        linear.test_bf16_weight_gradient_is_accumulated_in_fp32
    )
    test_flops = staticmethod(linear_products.test_flops_with_kept_and_with_recomputed_logits)
    test_rows_without_a_gradient_cost_nothing = staticmethod(linear_products.test_rows_without_a_gradient_cost_nothing)
    test_no_gradient_at_all = staticmethod(linear_products.test_no_gradient_at_all)

    def test_the_core_has_its_cuda_kernels(self) -> None:
        assert build_info()["cuda"] or REHEARSAL, "rebuild with TULU_HPC_CUDA=ON"


class TestLinearLogprobTriton:
    test_against_the_definition = staticmethod(linear_triton.test_against_the_definition)
    test_several_splits_rows_and_tiles = staticmethod(linear_triton.test_several_splits_rows_and_tiles)
    test_bf16_operands = staticmethod(linear_triton.test_bf16_operands)
    test_extreme_logits = staticmethod(linear_triton.test_extreme_logits)
    test_equal_and_one_hot_logits = staticmethod(linear_triton.test_equal_and_one_hot_logits)
    test_empty_ignored_expanded_and_nan = staticmethod(linear_triton.test_empty_ignored_expanded_and_nan)
    test_rows_without_a_gradient = staticmethod(linear_triton.test_rows_without_a_gradient_enter_no_backward_kernel)
    test_backward_is_deterministic = staticmethod(linear_triton.test_backward_is_deterministic)
    test_batch_invariance_is_bitwise = staticmethod(linear_triton.test_batch_invariance_is_bitwise)
    test_opcheck_and_compile = staticmethod(linear_triton.test_opcheck_and_compile)


class TestPackedAttention:
    test_against_the_definition = staticmethod(attention.test_against_the_definition)
    test_triton_against_the_definition = staticmethod(attention_triton.test_against_the_definition)
    test_the_tiles_that_ship = staticmethod(attention_triton.test_the_tiles_that_ship)
    test_many_query_heads_on_a_key_head = staticmethod(attention_triton.test_many_query_heads_on_a_key_head)
    test_two_runs_give_the_same_bits = staticmethod(attention_triton.test_two_runs_give_the_same_bits)
    test_equals_the_expanded_layout = staticmethod(attention_triton.test_equals_the_expanded_layout)
    test_merge = staticmethod(attention_parts.test_merge)
    test_sum_of_copies = staticmethod(attention_parts.test_sum_of_copies)

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("strategy", ["repeat", "merge"])
    @pytest.mark.parametrize("library", flash.NAMED)
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(pack=attention.packs(), heads=st.sampled_from([(4, 4), (8, 2), (8, 1)]))
    def test_flash(self, pack, heads, library: str, strategy: str, head_dim: int) -> None:
        """Every library that is installed, under both strategies, in bf16. What is installed and broken fails."""
        state = PROVIDERS[library.partition(":")[2]].state()
        reason = state.text if state.kind == "absent" else None
        if not REHEARSAL and (reason := reason or refusal(library, "cuda", torch.bfloat16, head_dim)):
            pytest.skip(reason)
        cu, prefix = pack
        plan = attention.make_plan(cu, prefix, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, strategy=strategy)
        found = attention.run(plan, torch.bfloat16, "cpu" if REHEARSAL else library)
        for mine, want in zip(found, attention.oracle(plan, torch.bfloat16)):
            largest = float(want.detach().abs().max()) if want.numel() else 0.0
            torch.testing.assert_close(mine.double(), want, rtol=0, atol=2e-2 * max(1.0, largest))


class TestPreferenceLoss:
    test_by_hand = staticmethod(preference_loss.test_by_hand)
    test_random_cases = staticmethod(preference_loss.test_random_cases)
    test_extremes = staticmethod(preference_loss.test_extremes)
    test_nothing_to_do = staticmethod(preference_loss.test_nothing_to_do)
    test_margin_is_exact = staticmethod(preference_loss.test_margin_is_exact)
    test_bitwise_repeatable = staticmethod(preference_loss.test_bitwise_repeatable)


class TestPolicyLoss:
    test_backends_against_the_reference = staticmethod(policy_loss.test_backends_against_the_reference)
    test_more_tokens_than_a_block = staticmethod(policy_loss.test_more_tokens_than_a_block)
    test_first_step_is_the_policy_gradient = staticmethod(policy_loss.test_first_step_is_the_policy_gradient)
    test_extreme_log_ratios = staticmethod(policy_loss.test_extreme_log_ratios)
    test_no_tokens = staticmethod(policy_loss.test_no_tokens)
    test_clips_of_gspo = staticmethod(policy_loss.test_clips_of_gspo)


class TestGaeAndValueLoss:
    test_gae = staticmethod(gae.test_backends_against_the_reference)
    test_long_segments = staticmethod(gae.test_long_segments)
    test_gae_edges = staticmethod(gae.test_edges)
    test_value_loss = staticmethod(value_loss.test_backends_against_the_reference)


class TestRope:
    test_against_the_definition = staticmethod(rope.test_against_the_definition)
    test_rows_do_not_depend_on_their_place = staticmethod(rope.test_rows_do_not_depend_on_their_place)
    test_grouped_views_of_a_fused_projection = staticmethod(rope.test_grouped_views_of_a_fused_projection)
