"""The adapter core: parameter-efficient fine-tuning methods on one frozen base model.

Names, signatures and files are those of huggingface peft 0.21.2; the implementation is this package's own.
"""

from workbench.errors import AdapterError as PeftError
from workbench.errors import NoMatchingPeftModuleError, PeftWarning

from .arrow_model import create_arrow_model
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .base_state import get_base_model_state_dict, set_base_model_state_dict
from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .config import PeftConfig, TaskType
from .convert import convert_to_lora, save_as_lora
from .functional import inject_adapter_in_model
from .intruders import reduce_intruder_dimension
from .kv_prefix import (
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from .loftq import replace_lora_weights_loftq
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
from .methods.lora_options import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from .methods.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from .methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from .methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from .methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from .methods.trainable_tokens import TrainableTokensConfig
from .mixed import PeftMixedModel
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
from .optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from .precision import cast_mixed_precision_params, prepare_model_for_kbit_training
from .registry import (
    METHODS,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PeftType,
    get_peft_config,
)
from .status import get_layer_status, get_model_status
from .tuner import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    AdaLoraModel,
    AdaptionPromptModel,
    IA3Model,
    LoHaModel,
    LoKrModel,
    LoraModel,
    TrainableTokensModel,
)
from .virtual_tokens import PromptLearningConfig

__all__ = [
    "METHODS",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
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
    "TrainableTokensModel",
    "VeloraConfig",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
