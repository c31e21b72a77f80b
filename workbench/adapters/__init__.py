"""The adapter core: parameter-efficient fine-tuning methods on one frozen base model.

Names, signatures and files are those of huggingface peft 0.21.2; the implementation is this package's own.
"""

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .config import PeftConfig, TaskType
from .methods.ia3 import IA3Config
from .methods.loha import LoHaConfig
from .methods.lokr import LoKrConfig
from .methods.lora import LoraConfig
from .methods.trainable_tokens import TrainableTokensConfig
from .model import PeftModel, get_peft_model
from .registry import METHODS

__all__ = [
    "METHODS",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "TrainableTokensConfig",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
