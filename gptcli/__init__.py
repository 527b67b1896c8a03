"""gptcli: pretrain, finetune, generate with and evaluate GPT language models from YAML configs."""

__version__ = "0.1.0"
