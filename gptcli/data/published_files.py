"""The names of the files in which models are published on the Hugging Face hub."""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
VOCABULARY, MERGES = "vocab.json", "merges.txt"  # GPT-2's BPE before there was tokenizer.json

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # endings of files never read unasked
