"""What a LoRA will cost, before anything is loaded: parameters, bytes, and a rank that fits a budget."""

from .core import plan
from .result import Proposal, TrainingPlan

__all__ = ["Proposal", "TrainingPlan", "plan"]
