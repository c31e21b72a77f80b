"""Optimisers made for LoRA."""

from .lorafa import create_lorafa_optimizer
from .loraplus import create_loraplus_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]
