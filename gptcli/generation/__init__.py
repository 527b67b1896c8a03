"""Generation: sampling, the decode engine, prompts and stop texts."""
