"""Sources, documents, tokens and packed batches; tokenizers and task formats."""
