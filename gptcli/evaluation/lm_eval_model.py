"""A model of ours as the lm-evaluation-harness (Gao et al. 2021) asks models: extra `eval`."""

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from gptcli import stop
from gptcli.data.continuations import continuation_ids, fitted
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.errors import ConfigError, DataError
from gptcli.evaluation.continuations import continuation_likelihoods
from gptcli.evaluation.perplexity import EncodedDocument, encode_documents, score_documents
from gptcli.generation.engine import Request, decode
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT

log = logging.getLogger("gptcli")

MAX_NEW_TOKENS = 256  # of tasks that do not say: the harness's own default
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


class HarnessModel(LM):
    """Scores and texts as `gpt eval` and `gpt generate` have them.

    A prompt that is too long loses its beginning. The methods raise DataError for a continuation
    that does not fit the block, ConfigError for an option of generation that is not known, and
    `stop.Stopped` when a stop is asked for.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, device: Device, precision: str) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._on, self._precision = device, precision

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): ln p in nats, and whether each token is the likeliest.

        Continuations of the same context share its reading, and their borders with it.
        """
        by_context: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(number)
        log.info(f"{len(requests)} likelihoods after {len(by_context)} contexts")
        contexts, continuations = [], []
        for context, numbers in by_context.items():
            stop.raise_if_requested()
            texts = [requests[number].args[1] for number in numbers]
            prompt, behind = self._tokens(context, texts)
            contexts.append(prompt)
            continuations.append(behind)
        found = continuation_likelihoods(
            self._model, contexts, continuations, self._on, self._precision
        )
        answers = [(0.0, False)] * len(requests)
        for numbers, texts, likelihoods in zip(
            by_context.values(), continuations, found, strict=True
        ):
            for number, tokens, likelihood in zip(numbers, texts, likelihoods, strict=True):
                answers[number] = likelihood.nats, likelihood.likeliest == tokens
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """ln p in nats of each text (text,), as `gpt eval` scores a document: in windows of
        block_size that do not overlap."""
        documents: list[EncodedDocument] = []
        numbers = []
        for number, request in enumerate(requests):
            if self._tokenizer.encode(request.args[0]):
                document = Document(f"text {number}", request.args[0])
                documents += encode_documents([document], self._tokenizer)
                numbers.append(number)
        log.info(f"likelihoods of {len(requests)} texts")
        found = [0.0] * len(requests)
        if documents:
            scores = score_documents(self._model, documents, self._on, precision=self._precision)
            for number, nats in zip(numbers, scores.nats.tolist(), strict=True):
                found[number] = -nats
        return found

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What the model writes behind each (context, options), up to the first of `until`."""
        prompts = [self._request(*request.args) for request in requests]
        log.info(f"answers to {len(requests)} prompts")
        found = [""] * len(requests)
        for number, (answer,) in decode(self._model, self._tokenizer, prompts):
            stop.raise_if_requested()
            found[number] = answer.text
        stop.raise_if_requested()  # before the first answer
        return found

    def _tokens(self, context: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        if not all(texts):
            raise DataError(f"a task asks for the likelihood of an empty text after {context!r}")
        body, tokens = continuation_ids(self._tokenizer, context, texts)
        longest, block_size = max(map(len, tokens)), self._model.config.block_size
        if longest > block_size:
            raise DataError(
                f"a task has a continuation of {longest} tokens, more than the model's block_size"
                f" {block_size}: {texts[0][:60]!r}"
            )
        return fitted(self._tokenizer, body, block_size + 1 - longest), tokens

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        options = dict(options)
        ends = options.pop("until", [])
        limits = [options.pop(name) for name in _LIMITS if name in options]
        samples = options.pop("do_sample", options.get("temperature", 0.0) > 0)
        given = {name: options.pop(name) for name in _SAMPLING if name in options}
        if options:
            raise ConfigError(f"a task asks for unknown options of generation: {sorted(options)}")
        if not samples:
            given["temperature"] = 0.0
        sampling = Sampling(
            stop=tuple(end for end in ([ends] if isinstance(ends, str) else ends) if end),
            max_new_tokens=int(limits[0]) if limits else MAX_NEW_TOKENS,
            **given,
        )
        block_size = self._model.config.block_size
        # Half of the block is for the prompt, where an answer would fill more of it.
        room = max(block_size - sampling.max_new_tokens, block_size // 2, 1)
        return Request(
            context, fitted(self._tokenizer, self._tokenizer.encode(context), room), sampling
        )
