"""The adapter core: parameter-efficient fine-tuning methods on one frozen base model.

Names, signatures and files are those of huggingface peft 0.21.2; the implementation is this package's own.
"""

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .config import PeftConfig, TaskType
from .convert import convert_to_lora, save_as_lora
from .methods.adalora import AdaLoraConfig
from .methods.adaption_prompt import AdaptionPromptConfig
from .methods.corda import preprocess_corda
from .methods.eva import get_eva_state_dict, initialize_lora_eva_weights
from .methods.ia3 import IA3Config
from .methods.loha import LoHaConfig
from .methods.lokr import LoKrConfig
from .methods.lora import LoraConfig, LoraRuntimeConfig
from .methods.lora_ga import preprocess_loraga
from .methods.lora_init import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .methods.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from .methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from .methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from .methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from .methods.trainable_tokens import TrainableTokensConfig
from .model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from .registry import METHODS
from .status import get_layer_status, get_model_status
from .virtual_tokens import PromptLearningConfig

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "CordaConfig",
    "EvaConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "TrainableTokensConfig",
    "convert_to_lora",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "save_as_lora",
    "set_peft_model_state_dict",
]
