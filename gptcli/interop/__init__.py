"""Published models and other formats: Hugging Face and GGUF weights, configs and tokenizers.

In: hub (fetches) -> hf_folder (opens) -> hf_files, hf_pickle (what is stored), hf_config with
hf_keys, hf_values, hf_rope (what config.json means), hf_weights (whose tensor is which), fit.
Out: hf_export, gguf_export, with tokenizer_export, gguf_tokenizer and safetensors_file.
"""
