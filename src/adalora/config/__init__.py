"""`AdaLoraConfig`: every setting of the method, validated and immutable; its rules and presets. Without torch."""

from adalora.config.presets import initial_rank, paper_initial_rank
from adalora.config.rules import BUDGET_FIELDS
from adalora.config.settings import AdaLoraConfig, Importance, Schedule

__all__ = ["BUDGET_FIELDS", "AdaLoraConfig", "Importance", "Schedule", "initial_rank", "paper_initial_rank"]
