"""Cause and cure of every diagnostic."""

from __future__ import annotations

# code -> (cause, cure)
EXPLANATIONS: dict[str, tuple[str, str]] = {
    "unstable-scores": (
        "The order of the triplets changes from one allocation to the next: the training is "
        "unstable or the scores are too noisy.",
        "Lower the learning rate or clip gradients; smooth the scores more "
        "(sensitivity_beta=0.95, uncertainty_beta=0.95); allocate less often (a larger "
        "allocation_interval).",
    ),
    "budget-too-low": (
        "The masks remove triplets the model needs: the target budget is smaller than what the task uses.",
        "Raise target_rank (or the budget you gave), or give the final phase more steps (a larger `final`).",
    ),
    "ranks-unbalanced": (
        "A few modules win nearly the whole budget, often because their gradients are on a larger scale.",
        "Set max_rank and min_rank; check that the starved modules are worth adapting at all.",
    ),
    "orthogonality-not-reached": (
        "Vectors of one module point the same way: its triplets say the same thing, and their scores mislead.",
        "Raise orthogonality_weight; lower the learning rate if that is not enough.",
    ),
    "slow-start": (
        "At the end of warm-up the adapter has hardly moved: learning rate or scale are too low, "
        "so the scores that the budget is dealt out by say little.",
        'Raise the learning rate, lora_alpha or the scale (e.g. scale="target"), or lengthen `warmup`.',
    ),
    "final-phase-too-short": (
        "The kept triplets get few steps at fixed ranks after the last pruning.",
        "Give the final phase more of the run (final=0.48 is the default), or train longer.",
    ),
    "no-gradient": (
        "Modules that take no part in the loss: unused by the forward pass, cut off by a frozen "
        "or detached part, or experts that no token reached.",
        "Leave them out of target_modules, or find out what keeps the gradient from them.",
    ),
    "ranks-differ-between-seeds": (
        "The ranks follow the noise of one training more than the task.",
        "Smooth the scores more (sensitivity_beta, uncertainty_beta = 0.95), lengthen `warmup`, "
        "train longer, or share the budget evenly: plain LoRA of the target rank may do as well.",
    ),
}
