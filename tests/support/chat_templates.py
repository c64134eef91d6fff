"""Chat templates that together use every construct found in real templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}

TURN = "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
PROMPT = "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"

GENERATION = (
    "{{- bos_token }}{%- for message in messages %}"
    + TURN
    + "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|eot_id|>' }}{% endgeneration %}"
    + "{%- else %}{{- message.content + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    + PROMPT
)

# Whitespace control by trim_blocks and lstrip_blocks, loop variables, filters with arguments, conditional expressions.
WHITE_SPACE = """{% for message in messages %}
    {% if loop.first %}
{{ bos_token }}
    {% endif %}
<{{ message['role'] | upper }} {{ loop.index }}/{{ loop.length }}>
{{ (message['content'] or 'nothing') | trim | replace('\\t', ' ') }}{{ '' if loop.last else eos_token }}
{% endfor %}{{ 'go: ' if add_generation_prompt else eos_token }}"""

# Tools, calls whose arguments are an object or a string, results; tojson with and without options.
TOOLS = """{%- if tools %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}{{ tool | tojson(indent=2, sort_keys=true) }}
        {{- tool.function.parameters | tojson(separators=(',', ':'), ensure_ascii=true) }}
    {%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[' + message.role + ':' + message.get('name', '-') + ']' }}
    {{- message.content if message.content is defined else '' }}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function %}
        {{- '<call ' + function.name + ' ' + (call.id | default('no id')) + '>' }}
        {%- if function.arguments is string %}
            {{- function.arguments }}
        {%- elif function.arguments is mapping %}
            {%- for key, value in function.arguments | items %}
                {{- key + '=' + (value if value is string else value | tojson) + ';' }}
            {%- endfor %}
        {%- endif %}
        {{- '</call>' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant:-]' }}{% endif %}"""

# Reasoning is kept only after the last question: namespaces, reversed slices of lists, methods of strings.
REASONING = """{%- set found = namespace(last=-1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if found.searching and message.role == 'user' and message.content is string %}
        {%- set found.last = index %}
        {%- set found.searching = false %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}
        {%- set thought = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and thought and loop.index0 > found.last %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|eot_id|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- set thinks = enable_thinking is not defined or enable_thinking %}
    {{- '<|start_header_id|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n\\n') }}
{%- endif %}"""

# Roles must alternate; loop controls; a system prompt is merged into the first question.
STRICT = """{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, turns = messages[0]['content'], messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate, and ' + message['role'] + ' is at ' ~ loop.index0) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set before = system + '\\n\\n' if loop.first and system is defined else '' %}
        {{- '[INST] ' + before + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
{%- endfor %}"""

# Macros, set blocks, call of macros with defaults, dictionaries, filters over lists, tests, string formatting.
MACROS = """{%- macro frame(role, end='<|eot_id|>') %}
    {{- '<|start_header_id|>%s<|end_header_id|>\\n\\n' | format(role) }}{{ caller() if caller }}{{ end }}
{%- endmacro %}
{%- set names = dict(user='human', assistant='model') %}
{%- set roles = messages | map(attribute='role') | unique | sort | join(',') %}
{{- bos_token ~ '(' ~ roles ~ ')' }}
{%- for message in messages if message.content %}
    {%- set role = names.get(message.role, message.role) %}
    {%- set text %}
  {{ message.content if message.content is string else message.content | length }}
    {%- endset %}
    {%- call frame(role) %}{{ text | trim }}{% endcall %}
{%- endfor %}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- if add_generation_prompt %}{{ frame('model', end='') }}{% endif %}"""

# The date, documents, variables passed by the caller.
DOCUMENTS = """{{- 'Year ' + strftime_now('%Y') + (' of ' + calendar if calendar is defined else '') + '\\n' }}
{%- for document in documents or [] %}
    {{- 'Document ' ~ loop.index ~ ': ' + document.title | default('untitled', true) + '\\n' }}
    {{- document['text'] + '\\n' }}
{%- endfor %}
{%- for message in messages %}
    {{- message.role + ': ' + message.content + '<|eot_id|>' }}
{%- endfor %}"""

# Contents in parts, null and undefined fields as text, arithmetic, comparisons, in-place tests.
PARTS = """{%- for message in messages %}
    {{- '#' ~ message.role ~ ' ' ~ message.name ~ ' ' ~ message.content | length }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content is iterable %}
        {%- for part in message.content if part.type == 'text' %}
            {{- ('|' if not loop.first) ~ part['text'] }}
        {%- endfor %}
    {%- elif message.content is none %}
        {{- 'NONE' }}
    {%- else %}
        {{- 'UNDEFINED' }}
    {%- endif %}
    {{- '<|eot_id|>' if message.role in ['user', 'assistant'] else '<|eom_id|>' }}
{%- endfor %}"""

# Forbidden by the sandbox, or undefined: must be refused in the same places.
SANDBOX = """{%- for message in messages %}
    {%- if 'private' in (message.content or '') %}
        {%- set hidden = namespace(_secret=1) %}
    {%- elif 'class' in (message.content or '') %}
        {{- message.content.__class__.__mro__ }}
    {%- elif 'append' in (message.content or '') %}
        {%- set _ = messages.append(message) %}
    {%- elif 'deep' in (message.content or '') %}
        {{- message.no.such.field }}
    {%- endif %}
    {{- message.role ~ message.content ~ message.missing ~ (message['tool_calls'] | default([]) | length) }}
{%- endfor %}"""

SINGLE: dict[str, str] = {
    "generation blocks": GENERATION,
    "white space": WHITE_SPACE,
    "tools": TOOLS,
    "reasoning": REASONING,
    "strict": STRICT,
    "macros": MACROS,
    "documents": DOCUMENTS,
    "parts": PARTS,
    "sandbox": SANDBOX,
}
NAMED = {"default": GENERATION, "tool_use": TOOLS, "rag": DOCUMENTS}


def transformers_tokenizer(vocab_folder: Path, template: str | Mapping[str, str]) -> Any:
    """A tokenizer of `transformers` with a template."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(vocab_folder / "tokenizer.json"), **SPECIAL)
    tokenizer.chat_template = template
    return tokenizer
