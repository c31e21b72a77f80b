"""workbench: find the best parameter-efficient fine-tuning method for a model, a data set and a memory budget."""

__version__ = "0.1.0"
