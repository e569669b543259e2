"""Chat templates: those that a checkpoint has, the formats that recipes name, and the Jinja that renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput, CorruptData
from workers.checkpoints.opening import LARGEST_CONFIG, Checkpoint
from workers.checkpoints.safetensors import read_json
from workers.storage import open_store

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMED: Mapping[str, str] = {
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca#data-release
    "alpaca": r"""
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% else -%}
Below is an instruction that describes a task. Write a response that appropriately completes the request.
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '\n\n### Instruction:\n' ~ message.content }}
{%- elif message.role == 'assistant' %}{{ '\n\n### Response:\n' ~ message.content }}{{ eos_token }}
{%- elif not (loop.first and message.role == 'system') %}{{ raise_exception('no place for the role ' ~ message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}""",
    # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    "chatml": r"""
{%- for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    # https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct
    "exaone": r"""
{%- if messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}
{%- for message in messages %}
{{- '[|' ~ message.role ~ '|]' ~ message.content ~ ('' if message.role == 'user' else '[|endofturn|]') ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}""",
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
    "llama3": r"""
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2; instructions of a system go before the first question
    "mistral": r"""
{{- bos_token }}
{%- set told = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}
{%- set first = 1 if told else 0 %}
{%- for message in messages[first:] %}
{%- if message.role == 'user' %}{{ '[INST] ' ~ (told if loop.first else '') ~ message.content ~ ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' ~ message.content ~ eos_token }}
{%- else %}{{ raise_exception('no place for the role ' ~ message.role) }}
{%- endif %}
{%- endfor %}""",
}
"""The formats that a recipe can name, written from their public descriptions; see `jobs.recipe.CHAT_TEMPLATES`."""


def jinja() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders chat templates.

    It compiles without computing constants: a template may never end.
    """
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation], optimized=False
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment


def check_template(template: str, place: str, remedy: str = "correct it") -> None:
    """`BadInput` for a text that is not Jinja, or that never names the messages of a chat."""
    from jinja2 import TemplateSyntaxError, meta

    try:
        jinja().from_string(template)
        names = meta.find_undeclared_variables(jinja().parse(template))
    except Exception as error:  # syntax, an unknown filter, nesting too deep for the parser
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        told = " ".join(str(error).split())
        raise BadInput(f"{place}: the chat template is not Jinja ({told}{line}); {remedy}") from None
    if "messages" not in names:
        raise BadInput(f"{place}: the chat template never names `messages`, so it shows no chat; {remedy}")


def template_of(checkpoint: Checkpoint) -> str | None:
    """The template that transformers takes for this checkpoint; None if there is none.

    That is chat_template.jinja, else `chat_template` in tokenizer_config.json, where the one called default counts
    among several, else chat_template.json of a processor. `CorruptData` if the file is broken.
    """
    store, files = open_store(checkpoint.url), checkpoint.side_files
    if (info := files.get("chat_template.jinja")) is not None:
        if info.size > LARGEST_CONFIG:
            raise CorruptData(f"{store.url}/{info.key}: has {info.size} bytes; is it the right file?")
        try:
            return bytes(store.read(info.key, etag=info.etag)).decode()
        except UnicodeDecodeError:
            raise CorruptData(f"{store.url}/{info.key}: not a text in UTF-8; fetch it again") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if name in files and (found := default_template(read_json(store, files[name], LARGEST_CONFIG))) is not None:
            return found
    return None


def default_template(config: Mapping[str, Any]) -> str | None:
    """`chat_template` of a tokenizer's config; of several, by name, the one called default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named: list[Any] = found
        defaults = [entry for entry in named if isinstance(entry, dict) and entry.get("name") == "default"]
        found = defaults[-1].get("template") if defaults else None
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None
