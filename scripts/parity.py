#!/usr/bin/env python3
"""Every preset beside its twin in transformers, as a Markdown table: parameters, difference.

    python scripts/parity.py                            # print, seconds: every preset made small
    python scripts/parity.py --full --write docs/models.md  # minutes, 4 GB: full size if it fits

Both get the same random weights (norms and biases too, logits of standard deviation about 1) and
read the same random tokens, in fp32 on the CPU. The twin is made of the config and the tensors
that `gpt export --to hf` writes. `--write FILE` puts the table between <!-- parity --> and
<!-- /parity --> in FILE.
"""

import argparse
import gc
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.interop.hf_config import ARCHITECTURES, family_of, hf_config
from gptcli.interop.hf_weights import layout, to_theirs
from gptcli.model.empty import empty_model
from gptcli.model.gpt import GPT

START, END = "<!-- parity -->", "<!-- /parity -->"
TOLERANCE = 1e-4
# The vocabulary a model was published with; the shapes without one get gpt2's.
VOCABULARIES = {"gpt1": 40478, "llama-135m": 49152, "llama-360m": 49152}
VOCABULARIES |= {f"llama-{size}": 32000 for size in ("7b", "13b", "33b", "65b")}
VOCABULARIES |= {f"modern-{size}": 151936 for size in ("0.6b", "1.7b", "4b", "8b")}
GPT2_VOCABULARY = 50257
FULL_SIZE_PARAMETERS = 410_000_000  # two models of fp32 weights in 4 GB
SMALL_VOCABULARY = 1000
TOKENS = 300  # more than the 256 of gpt3's bands


def vocab_size(preset: str) -> int:
    """The vocabulary that the parameters of `preset` are counted with."""
    return VOCABULARIES.get(preset, GPT2_VOCABULARY)


def parameters(preset: str) -> int:
    """The exact number of parameters, tied ones once; no weight is allocated."""
    return empty_model(ModelConfig(preset=preset), vocab_size(preset)).parameter_count()


def made_small(preset: str) -> ModelConfig:
    """The preset with 2 layers and few heads: same switches, head size, and ratios of widths."""
    full = ModelConfig(preset=preset)
    n_kv_head = 2
    n_head = n_kv_head * (full.n_head // full.kv_heads)
    sizes: dict[str, Any] = {
        "n_layer": 2,
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": full.n_embd * n_head // full.n_head,
        "n_inner": full.inner_size * n_head // full.n_head,
        "block_size": min(full.block_size, 512),
    }
    return ModelConfig(preset=preset, **sizes)


def difference(config: ModelConfig, vocabulary: int) -> float:
    """The largest difference of any logit between ours and the twin."""
    ours = GPT(config, vocabulary).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        _draw(name, parameter.data, generator)
    twin = make_twin(ours)
    length = min(config.block_size, TOKENS)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    with torch.inference_mode():
        return (ours(tokens) - twin(tokens).logits).abs().max().item()


def make_twin(ours: GPT) -> Any:
    """The model of transformers with the weights of `ours`, of which it copies as few as it can."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = family_of(ours.config)
    config = hf_config(ours.config, ours.vocab_size)
    made = AutoConfig.for_model(config.pop("model_type"), **config)
    models: Any = AutoModelForCausalLM  # its methods have no types
    twin = models.from_config(made, attn_implementation="eager").eval()
    weights: dict[str, Tensor] = {}
    state = ours.state_dict()
    for name, parts in layout(ours.config, ours.vocab_size, family).items():
        weights |= to_theirs(parts, state[name])
    found = twin.load_state_dict(weights, strict=False, assign=True)
    tied = ["lm_head.weight"] if ours.config.tie_embeddings else []
    if found.unexpected_keys or found.missing_keys != tied:
        raise SystemExit(
            f"{family}: missing {found.missing_keys}, {found.unexpected_keys} too many"
        )
    twin.tie_weights()
    return twin


def row(preset: str, full: bool) -> tuple[str, float]:
    """The line of the table, and the difference in it."""
    count, vocabulary = parameters(preset), vocab_size(preset)
    config = ModelConfig(preset=preset)
    size = "full size"
    if not (full and count <= FULL_SIZE_PARAMETERS):
        config, vocabulary = made_small(preset), SMALL_VOCABULARY
        size = f"2 layers, n_embd {config.n_embd}"
    found = difference(config, vocabulary)
    twin = ARCHITECTURES[family_of(config)]
    cells = [f"`{preset}`", f"`{twin}`", f"{count:,}", f"{vocab_size(preset):,}", size]
    return f"| {' | '.join(cells)} | {found:.1e} |", found


def write(table: str, path: Path) -> None:
    """Put `table` between the markers in the file."""
    text = path.read_text(encoding="utf-8")
    pattern = f"{re.escape(START)}.*?{re.escape(END)}"
    changed, count = re.subn(pattern, lambda _: f"{START}\n{table}\n{END}", text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{path}: {START} and {END} are there {count} times, not once")
    path.write_text(changed, encoding="utf-8")


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices that keep the size of what passes through them; norms near 1, biases near 0."""
    noise = torch.empty(parameter.shape).normal_(generator=generator)
    if parameter.ndim > 1:
        parameter.copy_(noise * parameter.size(1) ** -0.5)
    else:
        parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="at full size where 4 GB are enough")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into FILE")
    parser.add_argument("presets", nargs="*", default=[], metavar="PRESET", help="only these")
    given = parser.parse_args()
    if given.write and given.presets:
        parser.error("--write takes all presets")
    if unknown := [preset for preset in given.presets if preset not in PRESETS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PRESETS)}")
    lines = [
        "| preset | twin in transformers | parameters | vocabulary | compared | difference |",
        "|---|---|--:|--:|---|--:|",
    ]
    largest = 0.0
    for preset in given.presets or PRESETS:
        line, found = row(preset, given.full)
        print(line, file=sys.stderr)
        lines.append(line)
        largest = max(largest, found)
        gc.collect()  # the twin's modules point at each other
    if given.write:
        write("\n".join(lines), given.write)
    else:
        print("\n".join(lines))
    return int(not largest < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
