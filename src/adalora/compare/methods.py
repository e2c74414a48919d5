"""The methods that can be compared: what each trains, and how its size is set to the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import EvaConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from adalora.compare.bottleneck import inject
from adalora.compare.feeding import fill_eva
from adalora.config import initial_rank, paper_initial_rank
from adalora.errors import RecipeError
from adalora.tasks.data.rows import Splits
from adalora.tasks.kinds.base import Task
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.runs.head import marked_modules, whole_parameters
from adalora.tasks.runs.models import load_base, lora_config, trainable


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one method changes in a recipe.

    Attributes:
        help: One line.
        lora: Fields of LoraConfig.
        adalora: Fields of AdaLoraConfig beside the target rank; None where this package's method is not used.
        training: Fields of the recipe's training part.
        initial: Initial rank for a target rank.
        budgeted: Its size can be chosen; others are trained once, whatever the budget.
    """

    help: str
    lora: dict[str, Any] = field(default_factory=dict)
    adalora: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    initial: Callable[[int], int] = int
    budgeted: bool = True

    @property
    def adaptive(self) -> bool:
        """It is run by this package's controller."""
        return self.adalora is not None

    @property
    def allocates(self) -> bool:
        """It has a budget to share out, so that it starts above its target rank."""
        return self.adaptive and self.initial is not int


METHODS: dict[str, Method] = {
    "full": Method(help="all parameters", budgeted=False),
    "head": Method(help="the new head, and what the recipe trains whole", budgeted=False),
    "bitfit": Method(help="biases and head (Ben Zaken et al. 2022)", budgeted=False),
    "houlsby": Method(help="adapters after attention and feed-forward, layer norms (Houlsby et al. 2019)"),
    "pfeiffer": Method(help="adapters after feed-forward (Pfeiffer et al. 2021)"),
    "lora": Method(help="LoRA"),
    "rslora": Method(help="LoRA with scale α/√r", lora={"use_rslora": True}),
    "dora": Method(help="DoRA", lora={"use_dora": True}),
    "eva": Method(help="EVA: PEFT's initialisation and ranks from activations"),
    "peft-adalora": Method(help="AdaLoRA as PEFT ships it, the paper's settings", initial=paper_initial_rank),
    "svd-lora": Method(
        help="P, λ, Q without allocation",
        adalora={"parametrization": "svd", "schedule": "constant", "scale": "matched"},
    ),
    "random": Method(
        help="this package, triplets kept at random", adalora={"importance": "random"}, initial=initial_rank
    ),
    "ours": Method(help="this package, default configuration", adalora={}, initial=initial_rank),
    "gradient": Method(
        help="ours, started along the gradient of eight batches",
        adalora={},
        training={"gradient_batches": 8},
        initial=initial_rank,
    ),
}


def configure(
    recipe: Recipe,
    kind: str,
    *,
    rank: int,
    alpha: float | None = None,
    lora: dict[str, Any] | None = None,
    adalora: dict[str, Any] | None = None,
    start: float | None = None,
    equal: Literal["parameters", "rank"] = "parameters",
) -> Recipe:
    """A recipe as one method trains it.

    Args:
        recipe: Its model, data, task and training are kept.
        kind: Name in `METHODS`.
        rank: Budget, as the target rank.
        alpha: `lora_alpha`; by default the recipe's.
        lora: Further fields of LoraConfig.
        adalora: Further fields of AdaLoraConfig.
        start: Initial rank as a multiple of the target rank, for a method that allocates; by default the method's.
        equal: What an allocated adapter has in common with a LoRA of the target rank.
    """
    method = METHODS[kind]
    fields = recipe.to_dict()
    initial = method.initial(rank) if start is None or not method.allocates else round(start * rank)
    fields["lora"] = {**fields["lora"], "r": initial, **method.lora, **(lora or {})}
    if alpha is not None:
        fields["lora"]["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    fields["training"] |= method.training
    fields["adalora"] = None
    if method.adalora is not None:
        cost = {"budget_cost": equal} if method.allocates else {}
        fields["adalora"] = {**cost, "target_rank": rank, **method.adalora, **(adalora or {})}
    return Recipe.parse(fields, where=recipe.name)


class MethodRun:
    """One run of a method: builds its model and counts what it has trained.

    Args:
        kind: Name in `METHODS`.
        rank: Budget, as the target rank.
    """

    def __init__(self, kind: str, *, rank: int) -> None:
        self.kind = kind
        self.rank = rank

    def build(self, recipe: Recipe, task: Task, processor: Any, splits: Splits) -> Any:
        """Base model with what the method trains.

        Raises:
            RecipeError: The method cannot be used on this model or data; says why.
        """
        model, fresh = load_base(recipe, task, processor)
        config = lora_config(recipe, task, model, fresh)
        if self.kind == "peft-adalora":
            return get_peft_model(model, _peft_adalora(recipe, config, rank=self.rank))
        if self.kind == "eva":
            config.init_lora_weights, config.eva_config = "eva", EvaConfig()
            model = get_peft_model(model, config, low_cpu_mem_usage=True)
            return fill_eva(model, recipe, task, processor=processor, splits=splits)
        if self.kind not in ("full", "head", "bitfit", "houlsby", "pfeiffer"):
            return get_peft_model(model, config)
        if self.kind in ("houlsby", "pfeiffer"):
            model, budget = _lora_size(model, config)
            inject(model, "houlsby" if self.kind == "houlsby" else "pfeiffer", budget=budget)
        elif self.kind != "full":
            self._choose(model)
        for module in marked_modules(model):
            module.requires_grad_(True)
        return model

    def callbacks(self, model: Any) -> Sequence[TrainerCallback]:
        """What the method needs in the training loop."""
        return [PeftAllocation(model)] if self.kind == "peft-adalora" else []

    def parameters(self, model: nn.Module) -> int:
        """Parameters that the method has trained and that are still in use, without the head."""
        if self.kind == "peft-adalora":
            return _live_triplets(model)
        return trainable(model) - sum(p.numel() for p in whole_parameters(model))

    def _choose(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        if self.kind == "head" and not marked_modules(model):
            raise RecipeError("method head: this model's checkpoint brings its head; there is no new one to train")
        if self.kind == "bitfit":
            biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
            if not biases:
                raise RecipeError(f"method bitfit: {type(model).__name__} has no biases")
            for parameter in biases:
                parameter.requires_grad_(True)


class PeftAllocation(TrainerCallback):
    """Calls PEFT's `update_and_allocate` between the optimizer's step and the deletion of the gradients."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Smooth the scores and deal out the budget; `state.global_step` is the finished step's number."""
        self.model.base_model.update_and_allocate(state.global_step)


def _peft_adalora(recipe: Recipe, config: Any, *, rank: int) -> PeftAdaLoraConfig:
    """The settings of the paper's GLUE runs: 1.5 times the rank, β 0.85, γ 0.1, spans as on MNLI."""
    total = recipe.training.max_steps
    if total is None:
        raise RecipeError("method peft-adalora needs training.max_steps: PEFT wants the number of steps up front")
    return PeftAdaLoraConfig(
        task_type=config.task_type,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_r=rank,
        init_r=config.r,
        tinit=max(1, round(total * 8_000 / 85_900)),
        tfinal=max(1, round(total * 50_000 / 85_900)),
        deltaT=max(1, round(total * 100 / 85_900)),
        beta1=0.85,
        beta2=0.85,
        orth_reg_weight=0.1,
        total_step=total,
    )


def _live_triplets(model: nn.Module) -> int:
    parts = dict(model.named_parameters())
    total = 0
    for name, values in parts.items():
        if ".lora_E." in name:
            wide, tall = parts[name.replace("lora_E", "lora_A")], parts[name.replace("lora_E", "lora_B")]
            total += int((values != 0).sum()) * (wide.shape[1] + tall.shape[0] + 1)
    return total


def _lora_size(model: Any, config: Any) -> tuple[Any, int]:
    """Parameters of the LoRA that the recipe would train; the model comes back without it."""
    probe = get_peft_model(model, config)
    size = sum(p.numel() for name, p in probe.named_parameters() if ".lora_" in name)
    return probe.unload(), size
