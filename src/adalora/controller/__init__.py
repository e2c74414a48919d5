"""The decisions: when to score, allocate and remove; how a run is saved, goes on and ends."""

from adalora.controller.rank_controller import RankController

__all__ = ["RankController"]
