"""The Jinja environment of chat templates, compared with the one of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from runner_server.chat.environment import compiled, render
from support.conversations import ARGUMENTS, CONVERSATIONS, TOOLS

TEMPLATES = {
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n<{{ m.content }}>\n"
    "  {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index == 4 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "namespace named self": "{% set ns = namespace(self=1) %}{{ ns.self }}",
    "hidden name in a namespace": "{% set ns = namespace(_x=1) %}",
    "hidden name set": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}{{ dict([('x', 1)]).items() | list }}",
    "class of dict": "{{ dict.__class__ }}{{ dict.mro() }}",
    "date": "{{ strftime_now('%Y-%m') }}",
    "own refusal": "{{ raise_exception('no ' ~ messages[0].role) }}",
    "change of a message": "{{ messages.append(1) }}",
    "undefined": "{{ messages[0].x }}{{ messages[0].x.y }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "arguments": "{{ enable_thinking }}{{ documents }}{{ add_generation_prompt }}{{ tools }}",
    "escapes": "{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}",
    "many": "{{ range(1000000) | length }}",
    "not a template": "{% for %}",
}


def outcome(call: Callable[[], str]) -> tuple[str, str]:
    """Return the text, or the class and message of the error."""
    try:
        return "text", call()
    except Exception as error:  # noqa: BLE001 - the error is the outcome
        text = str(error)
        return type(error).__name__, "" if re.search("namespace|Dict", text) else text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_like_in_transformers(name: str) -> None:
    # Imported late: it takes a second, and every process of the tests collects this module.
    reference = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="transformers is not installed"
    )
    source = TEMPLATES[name]
    for case, messages in CONVERSATIONS.items():
        for tools in TOOLS.values():
            for arguments in ARGUMENTS.values():

                def ours(m: Any = messages, t: Any = tools, a: Any = arguments) -> str:
                    return render(compiled(source), m, t, a)

                def theirs(m: Any = messages, t: Any = tools, a: Any = arguments) -> str:
                    rendered, _ = reference.render_jinja_template(
                        [m], tools=t, chat_template=source, add_generation_prompt=True, **a
                    )
                    return str(rendered[0])

                assert outcome(ours) == outcome(theirs), case
