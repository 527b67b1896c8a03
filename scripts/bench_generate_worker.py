"""One contender of scripts/bench_generate.py, alone in its process; started by it, not by hand.

See bench_contenders.py for how it is driven. Everybody decodes greedily, all have the same weights,
and no text ends before its last token. Loading and packing weights is not timed; a rate is new
tokens over the seconds of prefill and decoding.
"""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bench_contenders import Parent

if TYPE_CHECKING:
    from torch import Tensor

    from gptcli.model.gpt import GPT

Quantize: TypeAlias = Literal["int8", "fp16"] | None
LINEAR_REPEATS = 20
BATCH_SINGLES = 4  # prompts that are timed one by one, instead of all


@dataclass(frozen=True)
class Work:
    """What a contender does.

    `task`: speed (an order is the number of tokens of a prompt, which is continued `n` times),
    batch (an order is the number of prompts in a batch) or linear (an order is as for speed).
    `model` is what the contender loads, `quantize` how ours packs it.
    """

    task: str
    contender: str
    model: str
    quantize: Quantize
    n: int
    new_tokens: int
    threads: int
    vocab_size: int


def prompt_ids(tokens: int, number: int, vocab_size: int) -> list[int]:
    """The prompt of that number: ids of no meaning, the last of the vocabulary not among them."""
    return [(7919 * (i + 1) + 104729 * (number + 1)) % (vocab_size - 1) for i in range(tokens)]


class Ours:
    """The model and the decoding of `gpt generate`."""

    def __init__(self, work: Work) -> None:
        from gptcli.device import resolve_device
        from gptcli.runs.load import load_model

        device = resolve_device("cpu").torch
        loaded = load_model(work.model, device, quantize=work.quantize)
        self._work, self._model, self._tokenizer = work, loaded.model, loaded.tokenizer
        self._decoders: dict[int, GPT] = {}

    def decoder(self, rows: int) -> "GPT":
        """What takes the steps of so many rows, packed when first asked for."""
        from gptcli.generation.kernel_race import packed_for

        if rows not in self._decoders:
            self._decoders[rows] = packed_for(self._model, rows, self._work.new_tokens)
        return self._decoders[rows]

    def threads(self, rows: int) -> int:
        """How many compute the steps of so many rows."""
        from gptcli.generation.kernel_race import best_threads

        return best_threads(self.decoder(rows), rows, self._work.new_tokens)

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of each text. SystemExit when one is too short."""
        from gptcli.generation.engine import Request, decode
        from gptcli.generation.kernel_race import decode_threads
        from gptcli.generation.sampling import Sampling

        sampling = Sampling(temperature=0.0, max_new_tokens=new_tokens)
        requests = [Request("", ids, sampling, self._work.n) for ids in prompts]
        rows = len(prompts) * self._work.n
        decoder = self.decoder(rows)
        with decode_threads(self.threads(rows)):
            began = time.perf_counter()
            made = list(decode(self._model, self._tokenizer, requests, decoder=decoder))
            seconds = time.perf_counter() - began
        texts = [sample.tokens for _, samples in made for sample in samples]
        if {len(text) for text in texts} != {new_tokens}:
            raise SystemExit("a text ended early")
        return seconds, texts

    def linear_seconds(self, prompt: list[int]) -> tuple[list[float], int]:
        """Seconds of the linear layers of a step alone, again and again, and their number."""
        import torch

        from gptcli.generation.kernel_race import decode_threads

        calls, found = self.linear_calls(prompt), list[float]()
        with torch.inference_mode(), decode_threads(self.threads(self._work.n)):
            for _ in range(LINEAR_REPEATS):
                began = time.perf_counter()
                for layer, x in calls:
                    layer(x)
                found.append(time.perf_counter() - began)
        return found, len(calls)

    def linear_calls(self, prompt: list[int]) -> "list[tuple[Callable[[Tensor], Tensor], Tensor]]":
        """The linear layers of a step of decoding, each with the input that it had in one, which
        is not recorded: the layers of a recorded one are not called."""
        import torch
        from torch import nn

        from gptcli.model.empty import empty_model

        fresh = empty_model(self._model.config, self._model.vocab_size)  # names are kept
        names = [name for name, module in fresh.named_modules() if isinstance(module, nn.Linear)]
        inputs: dict[str, Tensor] = {}
        layers = {name: self.decoder(self._work.n).get_submodule(name) for name in names}
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
            for name, layer in layers.items()
        ]
        decoder, rows = self.decoder(self._work.n), self._work.n
        cache = decoder.new_batch_cache(rows, 1)
        cache.begin([0] * rows, 1)
        with torch.inference_mode():
            decoder(torch.tensor(prompt[:1] * rows)[:, None], cache)
        for hook in hooks:
            hook.remove()
        if len(inputs) < len(names):
            raise SystemExit(f"only {len(inputs)} of {len(names)} linear layers were called")
        return [(layers[name], inputs[name]) for name in names]


def speed(work: Work, parent: Parent, decode: Callable[[list[int]], list[int]]) -> None:
    """Answers with the rate of `decode(prompt)`, and the first tokens that it made."""
    while count := parent.order():
        prompt = prompt_ids(count, 0, work.vocab_size)
        began = time.perf_counter()
        tokens = decode(prompt)
        seconds = time.perf_counter() - began
        parent.answer(rate=work.n * work.new_tokens / seconds, tokens=tokens[:8])


def transformers_decoder(work: Work) -> Callable[[list[int]], list[int]]:
    """GPT2LMHeadModel.generate with its cache, all rows in one batch."""
    import torch
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(work.model, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def decode(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt] * work.n)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.new_tokens,
            do_sample=False,
            use_cache=True,
        )
        assert made.shape == (work.n, len(prompt) + work.new_tokens)
        tokens: list[int] = made[0, len(prompt) :].tolist()
        return tokens

    return decode


class Llama:
    """llama.cpp through the C interface of llama-cpp-python: the rows are parallel sequences."""

    def __init__(self, work: Work) -> None:
        import llama_cpp

        self._api, self._work = llama_cpp, work
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(work.model.encode(), settings)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = 1024 * work.n
        context.n_batch = 1024
        context.n_seq_max = work.n
        context.n_threads = context.n_threads_batch = work.threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot load {work.model}")
        self._batch = llama_cpp.llama_batch_init(1024, 0, 1)
        self._memory = llama_cpp.llama_get_memory(self._context)

    def decode(self, prompt: list[int]) -> list[int]:
        """The prompt is read once and its cache copied to every sequence."""
        n, api = self._work.n, self._api
        api.llama_memory_clear(self._memory, False)
        last = len(prompt) - 1
        self._feed([(token, i, 0, i == last) for i, token in enumerate(prompt)])
        first = self._likeliest(last)
        for sequence in range(1, n):
            api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        tokens, made = [first] * n, [first]
        for position in range(len(prompt), len(prompt) + self._work.new_tokens - 1):
            self._feed([(token, position, row, True) for row, token in enumerate(tokens)])
            tokens = [self._likeliest(row) for row in range(n)]
            made.append(tokens[0])
        return made

    def _feed(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Read tokens, each with its position, its sequence and whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if status := self._api.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode: {status}")

    def _likeliest(self, row: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._work.vocab_size,)).argmax())


def batch(work: Work, parent: Parent, ours: Ours) -> None:
    """Answers an order of one with the rate of some prompts one by one, others with a batch's."""
    while count := parent.order():
        prompts = [prompt_ids(4, i, work.vocab_size) for i in range(max(count, BATCH_SINGLES))]
        if count == 1:
            seconds = sum(ours.decode([prompt], work.new_tokens)[0] for prompt in prompts)
        else:
            seconds, _ = ours.decode(prompts, work.new_tokens)
        parent.answer(rate=len(prompts) * work.new_tokens / seconds)


def linear(work: Work, parent: Parent, ours: Ours) -> None:
    """Answers with the seconds of a step of decoding, and those of its linear layers alone."""
    while count := parent.order():
        prompt = prompt_ids(count, 0, work.vocab_size)
        short, _ = ours.decode([prompt], 1)
        whole, _ = ours.decode([prompt], work.new_tokens)
        alone, layers = ours.linear_seconds(prompt)
        step = (whole - short) / (work.new_tokens - 1)
        parent.answer(step=step, linear=statistics.median(alone), layers=layers)


def main() -> None:
    work, parent = Work(**json.loads(sys.argv[1])), Parent()
    facts: dict[str, Any] = {"contender": work.contender}
    if work.contender == "transformers":
        decode = transformers_decoder(work)
        parent.answer(**facts)
        speed(work, parent, decode)
    elif work.contender == "llama":
        llama = Llama(work)
        parent.answer(**facts)
        speed(work, parent, llama.decode)
    else:
        ours = Ours(work)
        parent.answer(**facts)
        if work.task == "speed":
            speed(work, parent, lambda prompt: ours.decode([prompt], work.new_tokens)[1][0])
        elif work.task == "batch":
            batch(work, parent, ours)
        else:
            linear(work, parent, ours)
    parent.answer(ended=True)


if __name__ == "__main__":
    main()
