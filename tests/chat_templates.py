"""Chat templates in the public forms of tool calls, and a tokenizer that spells them.

Written from the formats' documentation: how each family writes roles, tools, calls and results, and
what it does with reasoning and white space. They are shorter than the models' own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QWEN = """\
{%- if tools or messages[0].role == 'system' %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{% if tools %}# Tools

<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>

For each call, return
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{% endif %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}
{%- set content = m.content %}
{%- if '</think>' in content and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant
{{ content }}
{%- for call in m.tool_calls %}
{%- if not loop.first or content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

CODER = """\
{%- if tools %}<|im_start|>system
You have these functions:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call one so:
<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content | trim }}
{%- for call in m.tool_calls %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

{% if tools %}Environment: ipython
{% endif %}Be brief.<|eot_id|>
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}
{%- set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.first %}Answer with a call {"name": function name, "parameters": arguments}.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

MISTRAL = """\
<s>{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}[INST] {{ m.content }}[/INST]
{%- elif m.role == 'assistant' and m.tool_calls is defined %}{{ m.content }}[TOOL_CALLS] [
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- '' if loop.first else ', ' }}{"name": "{{ call.function.name }}", "arguments": {{
call.function.arguments | tojson }}, "id": "{{ call.id }}"}{% endfor %}]</s>
{%- elif m.role == 'assistant' %} {{ m.content }}</s>
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
[TOOL_RESULTS] {"content": {{ m.content | tojson }}, {{ '' -}}
"call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- endif %}{% endfor %}"""

HARMONY = """\
<|start|>system<|message|>Valid channels: analysis, commentary, final.
{%- if tools %}
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}<|end|>
{%- set ns = namespace(last=-1, name='') %}
{%- for m in messages %}
{%- if m.role == 'assistant' and not m.tool_calls %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- set f = m.tool_calls[0].function %}{% set ns.name = f.name %}
{%- if m.thinking and loop.index0 > ns.last -%}
<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
{%- if m.content -%}
<|start|>assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>{% endif -%}
<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>
{{- f.arguments | tojson }}<|call|>
{%- elif m.role == 'assistant' -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- elif m.role == 'tool' -%}
<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>
{{- m.content | tojson }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

CHATML = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A template that has no place for tools."""

_CHATML = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_RESULTS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>")
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "qwen": (QWEN, _CHATML, "<|im_end|>"),
    "coder": (CODER, _CHATML, "<|im_end|>"),
    "llama": (LLAMA, (*_HEADERS, "<|eom_id|>", "<|python_tag|>"), "<|eot_id|>"),
    "mistral": (MISTRAL, ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", *_RESULTS), "</s>"),
    "harmony": (HARMONY, _CHANNELS, "<|return|>"),
    "chatml": (CHATML, _CHATML, "<|im_end|>"),
}
"""Name -> template, special tokens, end token."""
_ORDINARY = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_TEXT = 'the tool name is {"name": "look_up", "arguments": {"key": 1}} and the answer was found. '


@cache
def tokenizer(name: str) -> Any:
    """A byte-level tokenizer of about 300 tokens, so that a text can be spelled in many ways."""
    template, special, end = TEMPLATES[name]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([_TEXT], trainer)
    if name in ("qwen", "coder"):  # tokens of their own, but part of the text
        raw.add_tokens([AddedToken(text, special=False) for text in _ORDINARY])
    out = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=end, additional_special_tokens=[*special]
    )
    out.chat_template = template
    return out
