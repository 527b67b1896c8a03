"""Published sizes of presets, for tests."""

# Preset: vocabulary, parameters. Radford et al. 2018 and 2019 as released; Touvron et al. 2023,
# SmolLM2 and Qwen3 as their files on the hub count them.
EXACT = {
    "gpt1": (40478, 116_534_784),
    "gpt2": (50257, 124_439_808),
    "gpt2-medium": (50257, 354_823_168),
    "gpt2-large": (50257, 774_030_080),
    "gpt2-xl": (50257, 1_557_611_200),
    "llama-135m": (49152, 134_515_008),
    "llama-360m": (49152, 361_821_120),
    "llama-7b": (32000, 6_738_415_616),
    "llama-13b": (32000, 13_015_864_320),
    "llama-65b": (32000, 65_285_660_672),
    "modern-0.6b": (151936, 596_049_920),
    "modern-8b": (151936, 8_190_735_360),
}
# Brown et al. 2020, table 2.1: the sizes in the names.
GPT3 = {
    "gpt3-small": 125e6,
    "gpt3-medium": 350e6,
    "gpt3-large": 760e6,
    "gpt3-xl": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13e9,
    "gpt3-175b": 175e9,
}
