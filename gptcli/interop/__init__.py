"""Published models and other formats: Hugging Face and GGUF weights, configs and tokenizers."""
