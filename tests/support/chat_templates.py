"""Chat templates with the habits of published ones that no package ships, in few lines: what they do to messages is what counts."""

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
"""A blank before what the assistant says, and no system message."""

LLAMA_TOOLS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set head = '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' %}"
    "{% if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{% set call = m.tool_calls[0].function %}{{ head + \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ head + (m.content | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ head + (m.content | trim) + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Arguments under another name, and contents of tools as JSON."""

HARMONY = (
    "<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls is defined %}"
    "{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}"
    "{% elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{% if m.reasoning_content is defined %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>tool<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""Channels, three tokens that end a turn, and reasoning that only the last turn keeps."""

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)

NEWLINE_EOS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% if m.role == 'assistant' %}<eos>\n{% endif %}{% endfor %}"
)

SHOUTING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
"""Rewrites what is said."""

THINKING_PROMPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""The prompt opens the reasoning, which only the last turn keeps."""

ARGUMENTS_AS_THEY_ARE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
    "{{ call.function.name }}({{ call.function.arguments }}){% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
"""Right for arguments that are JSON; an object comes out as Python prints it."""
