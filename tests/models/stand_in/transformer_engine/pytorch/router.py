def _no_experts(*_: object, **__: object) -> None:
    raise NotImplementedError("no experts here")


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = _no_experts
