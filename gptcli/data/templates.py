"""Prompts from the fields of rows: Jinja templates, those that are shipped among them."""

import re
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptcli.config.finetune_schema import FinetuneConfig, Task
from gptcli.errors import ConfigError, DataError

# A response begins in a new line: so its first word is encoded alike in every prompt.
DEFAULTS: dict[Task, str] = {
    "completion": "{{ prompt }}",
    "preference": "{{ prompt }}",
    "instruction": """\
Below is a task{% if input %}, with the text that it is about{% endif %}. Do what it asks.

### Task
{{ instruction }}

{% if input %}### Text
{{ input }}

{% endif %}### Answer
""",
    "classification": "{{ text }}\n\nLabel:\n",
    "pairs": "First: {{ text1 }}\nSecond: {{ text2 }}\n\nLabel:\n",
    "multiple_choice": """\
{{ prompt }}
{% for choice in choices %}- {{ choice }}
{% endfor %}
Answer:
""",
    "continuation": "{{ prompt }} ",
}

# By name, for `finetune.template`. Variables are the task's fields and all others of the row.
SHIPPED: dict[str, str] = {
    "summarisation": "Text:\n{{ prompt }}\n\nSummary of the text:\n",
    "translation": "Original:\n{{ prompt }}\n\nTranslation:\n",
    "question_answering": """\
{% if context is defined %}{{ context }}

{% endif %}Question: {{ prompt }}
Answer:
""",
    "question_answering_zh": """\
{% if context is defined %}{{ context }}

{% endif %}问题：{{ prompt }}
回答：
""",
    "sentiment": "Review: {{ text }}\n\nIs the review positive or negative?\n",
    "sentiment_zh": "评论：{{ text }}\n\n这条评论的情感是：\n",
    "code": "Write Python code.\n\n{{ prompt }}\n\nCode:\n",
}

# Chat templates: role names as text, and the end-of-text token behind each answer.
_CHAT = """\
{% for message in messages %}{{ names.get(message.role, message.role) }}@
{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}{% if add_generation_prompt %}{{ names.assistant }}@
{% endif %}"""


def _dialogue(colon: str, **names: str) -> str:
    shown = ", ".join(f"{role!r}: {name!r}" for role, name in names.items())
    return f"{{% set names = {{{shown}}} %}}" + _CHAT.replace("@", colon)


CHAT_TEMPLATES: dict[str, str] = {
    "dialogue": _dialogue(":", system="System", user="User", assistant="Assistant"),
    "dialogue_zh": _dialogue("：", system="系统", user="用户", assistant="助手"),
}
DEFAULT_CHAT = "dialogue"


def named_template(template: str, shipped: dict[str, str]) -> str:
    """Jinja text: `template` itself, or the shipped one of that name. ConfigError for a word that
    is no name of one."""
    if template in shipped:
        return shipped[template]
    if re.fullmatch(r"\w+", template):
        raise ConfigError(
            f"finetune.template: no template is called {template!r}",
            hint=f"shipped for this task: {', '.join(shipped)}; or write Jinja: '{{{{ prompt }}}}'",
        )
    return template


class PromptTemplate:
    """Fills a task's template from rows, in a sandbox. ConfigError when it is no Jinja template."""

    def __init__(self, settings: FinetuneConfig) -> None:
        default = DEFAULTS.get(settings.task, "")
        text = default
        if settings.template is not None:
            text = named_template(settings.template, SHIPPED)
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ConfigError(f"finetune.template: {error}") from error

    def render(self, row: dict[str, Any], values: dict[str, Any], where: str) -> str:
        """The prompt of a row with its own fields and the task's `values` as variables.

        DataError, with `where`, when the template cannot be filled from them.
        """
        try:
            return self._template.render({**row, **values})
        except Exception as error:  # the template is the user's program: whatever it raises
            raise DataError(
                f"{where}: finetune.template: {error} (has: {', '.join(map(str, row))})"
            ) from error
