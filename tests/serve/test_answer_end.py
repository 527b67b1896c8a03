"""Where the answers of a chat end that is served."""

from test_chat import CHATML, EOT_TEXT, IM_END, IM_START, model_saying

from gptcli.data.special_tokens import SpecialTokens
from gptcli.data.tokenizer import Tokenizer
from gptcli.serve.server import ending_with_answers


def test_answers_end_where_the_template_ends_them() -> None:
    """Guards: an answer that goes on into the next turn: behind a token that ends answers, not
    texts, or, without such a token, into what another would say."""
    special = SpecialTokens({EOT_TEXT: 256, "<|im_start|>": IM_START, "<|im_end|>": IM_END})
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer("file", ranks, r"[\s\S]", 256, special)
    tokenizer.source = {"chat_template": CHATML}
    served, template, _ = ending_with_answers(model_saying(list(b"abc"), tokenizer))
    assert template is not None
    assert served.tokenizer.ends == {256, IM_END}
    assert tokenizer.ends == {256}
    plain = Tokenizer.of_bytes()
    served, template, stops = ending_with_answers(model_saying(list(b"abc"), plain))
    assert template is not None
    assert served.tokenizer is plain
    assert stops
    assert all(stop.strip() for stop in stops)
