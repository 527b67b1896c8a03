"""Tests of gptcli.data: tokenizer."""
