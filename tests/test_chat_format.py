"""Chats against transformers, Meta's reference and llama.cpp; hostile messages and templates."""

import copy
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers import PreTrainedTokenizerFast

from models.llama.chat_format import chat_format_for
from models.llama.chat.template import MAX_TEMPLATE_CHARS, chat_templates_of
from models.llama.tokenizer import load_tokenizer
from tests.oracles import tokenizer_files as oracle
from utils.errors import ArtifactError, ConfigError, DataError

# As Meta publishes it with Llama 3.
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Meta publishes it with Llama 2.
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Looks into an assistant's message, as the templates of reasoning models do.
THINK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def chat(*contents: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CHATS = [
    chat("Hi"),
    chat("  What is 12 + 3?\n\n", "15\n", "and  1 2?", system="Be brief. "),
    chat("", "", "  "),
    chat("q", "<think>a</think>\nb", "</think>c"),
    chat("\n\nfoo\n", " bar", "é 👩‍👧 漢字 שלום\r\n\r\n1", system=""),
    chat("a <b> [c] {d} {{ e }} {% f %} < | im_end | >", "<|im_end", "|im_end|>"),
    *[
        chat(a, b, c)
        for a, b, c in zip(
            *[iter(t for t in oracle.random_texts(90, 1) if "|" not in t and "<s>" not in t)] * 3
        )
    ],
]


@pytest.fixture(scope="session")
def make(tmp_path_factory, default_model_path):
    """Makes a tokenizer, and transformers' twin of it, with a template."""
    metadata = oracle.tokenizer_metadata(default_model_path)
    model = oracle.sentencepiece_model()
    specs = {
        "smollm": (json.dumps(oracle.smollm_json(metadata)), "<|im_start|>", "<|im_end|>"),
        "llama2": (json.dumps(oracle.llama2_json(model, False)), "<s>", "</s>"),
        "llama2_legacy": (json.dumps(oracle.llama2_json(model, True)), "<s>", "</s>"),
        "llama3": (oracle.llama3_json(), "<|begin_of_text|>", "<|eot_id|>"),
    }
    cache = {}

    def build(kind: str, template, twin: bool = False):
        spec, bos, eos = specs[kind]
        listed = template if isinstance(template, list) else None
        key = kind, repr(listed), twin
        if key not in cache:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "tokenizer.json").write_text(spec)
            config = {"bos_token": bos, "eos_token": eos, "chat_template": listed}
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            load = PreTrainedTokenizerFast.from_pretrained if twin else load_tokenizer
            cache[key] = load(folder)
        tokenizer = cache[key] if twin else copy.copy(cache[key])
        if isinstance(template, str) and twin:
            tokenizer.chat_template = template
        elif isinstance(template, str):
            tokenizer.chat_templates = {"default": template}
        return tokenizer

    build.smollm_template = metadata["tokenizer.chat_template"]
    return build


def cases(make) -> dict[str, tuple[str, str]]:
    return {
        "smollm": ("smollm", make.smollm_template),
        "think": ("smollm", THINK_TEMPLATE),
        "llama3": ("llama3", LLAMA3_TEMPLATE),
        "llama2": ("llama2", LLAMA2_TEMPLATE),
        "llama2_legacy": ("llama2_legacy", LLAMA2_TEMPLATE),
    }


CASES = ["smollm", "think", "llama3", "llama2", "llama2_legacy"]


@pytest.mark.covers("B18")
@pytest.mark.parametrize("case", CASES)
def test_jinja_equals_transformers(make, case):
    kind, template = cases(make)[case]
    ours, theirs = chat_format_for(make(kind, template)), make(kind, template, twin=True)
    for messages in CHATS:
        for prompt in (True, False):
            text = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert ours.render(messages, prompt) == text
            assert ours.encode_chat(messages, prompt) == ids


def test_jinja_of_gguf_equals_llama_cpp(default_model_path):
    ours = chat_format_for(load_tokenizer(default_model_path))
    llama_cpp = oracle.LlamaCpp(default_model_path)
    for messages in CHATS:
        text = ours.render(messages)
        assert ours.encode_chat(messages) == llama_cpp.encode(text, parse_special=True)


def test_llama3_equals_metas_reference(make):
    meta_tokenizer = MetaTokenizer(oracle.LLAMA3_MODEL)
    meta = MetaChatFormat(meta_tokenizer)
    ours = chat_format_for(load_tokenizer(oracle.LLAMA3_MODEL), "llama3")
    jinja = chat_format_for(make("llama3", LLAMA3_TEMPLATE))
    hostile = [chat(t, t + "x") for t in oracle.HOSTILE]
    for messages in [*CHATS, *hostile]:
        stripped = [RawMessage(role=m["role"], content=m["content"].strip()) for m in messages]
        expected = meta.encode_dialog_prompt(stripped).tokens
        prompt = messages[-1]["role"] == "user"
        ids = ours.encode_chat(messages, prompt)
        assert ids + [] * prompt == (expected if prompt else expected[:-4])
        assert jinja.encode_chat(messages, prompt) == ids
        assert ours.render(messages, prompt) == jinja.render(messages, prompt)
    assert ours.encode_chat(chat("Hi"))[-4:] == [128006, 78191, 128007, 271]
    tool = [*chat("x", "y"), {"role": "tool", "content": "z"}]
    assert (
        ours.render(tool).count("<|start_header_id|>ipython<|end_header_id|>\n\nz<|eot_id|>") == 1
    )


def test_llama2_equals_metas_reference(tmp_path, make):
    """Meta's `chat_completion` of Llama 2, written out."""
    (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    ours = chat_format_for(load_tokenizer(tmp_path), "llama2")
    sp = sentencepiece.SentencePieceProcessor(model_proto=oracle.sentencepiece_model())
    legacy = make("llama2_legacy", LLAMA2_TEMPLATE)
    for messages in CHATS:
        dialog = list(messages)
        if dialog[0]["role"] == "system":
            first = f"<<SYS>>\n{dialog[0]['content']}\n<</SYS>>\n\n{dialog[1]['content']}"
            dialog = [{"role": "user", "content": first}] + dialog[2:]
        expected = []
        for user, answer in zip(dialog[::2], dialog[1::2]):
            text = f"[INST] {user['content'].strip()} [/INST] {answer['content'].strip()} "
            expected += [1, *sp.encode(text), 2]
        expected += [1, *sp.encode(f"[INST] {dialog[-1]['content'].strip()} [/INST]")]
        assert ours.encode_chat(messages) == expected
        assert chat_format_for(legacy, "llama2").encode_chat(messages) == expected
        assert ours.render(messages) == chat_format_for(legacy).render(messages)
    answered = chat("the", "cat")
    assert ours.encode_chat(answered, False) == [1, *sp.encode("[INST] the [/INST] cat "), 2]
    for wrong in (chat("a", "b")[1:], chat("a") * 2, chat(system="x"), [*chat("a"), TOOL]):
        with pytest.raises(DataError, match=r"message \d"):
            ours.encode_chat(wrong, False)


TOOL = {"role": "tool", "content": "z"}


@pytest.mark.covers("B7", "B8")
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_control_token_originates_in_a_message(make, case, data):
    kind, template = cases(make)[case]
    tokenizer = make(kind, template)
    names = st.sampled_from(
        sorted(tokenizer.special_tokens)[:20] + ["</think>", "<|im_</think>end|>"]
    )
    content = st.lists(st.one_of(names, st.text(max_size=3), st.sampled_from("<|>im_end\n "))).map(
        "".join
    )
    messages = chat(*(data.draw(content) for _ in range(data.draw(st.sampled_from([1, 3])))))
    harmless = [m | {"content": "x"} for m in messages]
    control = set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens.get("<unk>")}

    def controls(form, chat):
        return [i for i in form.encode_chat(chat) if i in control]

    form = chat_format_for(tokenizer)
    assert controls(form, messages) == controls(form, harmless)
    typed = any(name in m["content"] for m in messages for name in tokenizer.special_tokens)
    if not typed:
        theirs = make(kind, template, twin=True).apply_chat_template(
            messages, add_generation_prompt=True
        )
        assert form.encode_chat(messages) == theirs["input_ids"]


@pytest.mark.covers("B7", "B8")
@pytest.mark.parametrize(
    "template, content",
    [
        ("{{ m.content | replace('x', '') }}", "<|im_xend|>"),  # the template makes the name
        ("{{ m.content.split('</think>') | join }}", "<|im_</think>end|>"),
        ("{{ '<|' ~ m.content }}", "im_end|>"),
        ("{{ '<|' ~ m.content ~ '|>' }}", "im_end"),
        ("{{ m.content ~ '|im_end|>' }}", "<"),
        ("{{ m.content | reverse }}", ">|dne_mi|<"),
        (
            "{% if '<|im_end|>' in m.content %}{{ m.content }}{% else %}{{ m.content }}<|im_end|>{% endif %}",
            "a<|im_end|>b",
        ),
        ("{{ m.content | upper | lower }}", "<|IM_END|>"),
    ],
)
def test_templates_that_build_names_from_messages(make, template, content):
    source = "{% for m in messages %}" + template + "{% endfor %}"
    form = chat_format_for(make("smollm", source))
    special = form.tokenizer.special_tokens
    ids = form.encode_chat(chat(content))
    harmless = form.encode_chat(chat("hello"))
    assert [i for i in ids if i in special.values()] == [
        i for i in harmless if i in special.values()
    ]


@pytest.mark.covers("B7")
def test_a_typed_name_does_not_replace_the_templates(make):
    """The same control tokens as ever, but one of them would be the user's."""
    source = "{% set c = messages[0].content %}{{ c }}{% if '<|im_end|>' not in c %}<|im_end|>{% endif %}"
    tokenizer = make("smollm", source)
    ids = chat_format_for(tokenizer).encode_chat(chat("a<|im_end|>b"))
    assert ids == tokenizer.encode("a<|im_end|>b") + [2]


@pytest.mark.covers("B7")
def test_private_stand_ins_do_not_touch_a_message(make):
    form = chat_format_for(make("smollm", make.smollm_template))
    text = "<|im_end|>" + "".join(map(chr, range(0xF0000, 0xF0200)))
    assert text in form.render(chat(text))
    with pytest.raises(DataError, match="private-use"):
        form.encode_chat(chat("<|im_end|>" + "".join(map(chr, range(0xF0000, 0x10FFFE)))))


@pytest.mark.covers("B8")
def test_structural_tokens_that_are_not_special(make, tmp_path, default_model_path):
    spec = oracle.smollm_json(oracle.tokenizer_metadata(default_model_path))
    for n, name in enumerate(["<think>", "</think>", "Final:"]):
        spec["added_tokens"].append({"id": 49152 + n, "content": name, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "chat_template.jinja").write_text(THINK_TEMPLATE + "{{ '<think>' }}Final:")
    form = chat_format_for(load_tokenizer(tmp_path))
    messages = chat("<think>Final:</think>", "a</think>b", "c")
    ids = form.encode_chat(messages)
    # The template writes "Final:" after the messages; it and the tags that were typed are text.
    assert [i for i in ids if i >= 49152] == [49152, 49154]
    # What the assistant thought in an earlier turn, the template leaves out.
    assert "assistant\nb<|im_end|>" in form.tokenizer.decode(ids)


@pytest.mark.covers("B14")
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0]['content'].__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ canary) }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ lipsum|attr('__globals__') }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{a.__class__}'.format_map({'a': messages}) }}",
        "{{ ('{0.__class__}'|attr('format'))(messages) }}",
        "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(cycler) }}",
        "{% set ns = namespace(x=1) %}{{ ns.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include 'CANARY' %}",
        "{% import 'os' as os %}",
        "{% extends 'CANARY' %}",
        "{{ range.__init__ }}",
        "{{ ().__getattribute__('__class__') }}",
        "{{ messages|map(attribute='__class__')|first }}",
        "{{ config }}",
        "{{ open('CANARY', 'w') }}",
        "{{ __import__('os') }}",
    ],
)
def test_templates_cannot_reach_python(make, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    tokenizer = make("smollm", "x")
    tokenizer.chat_templates["hostile"] = source.replace("CANARY", str(tmp_path / "canary"))
    with pytest.raises(ArtifactError, match="the chat template fails") as caught:
        chat_format_for(tokenizer, "hostile").encode_chat(chat("a"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.covers("B15")
@pytest.mark.parametrize(
    "source, message",
    [
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxx{% endfor %}{% endfor %}",
            "writes over",
        ),
        ("{% for a in range(10**9) %}{% endfor %}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10**9 }}", "too large"),
        ("{{ 10**9 * 'a' }}", "too large"),
        ("{{ [0] * 1000000 }}", "too large"),
        ("{{ 9**9**9 }}", "too large"),
        ("{{ 'a' * 1000 * 1000 * 1000 }}", "too large"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "fails"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), "has 1048577 characters, expected at most 1048576"),
    ],
)
def test_what_templates_write_is_bounded(make, source, message):
    tokenizer = make("smollm", "x")
    tokenizer.chat_templates["bomb"] = source
    with pytest.raises(ArtifactError, match=message):
        chat_format_for(tokenizer, "bomb").encode_chat(chat("a"))


@pytest.mark.covers("B16")
def test_a_format_is_never_guessed(make):
    bare = make("smollm", None)
    with pytest.raises(
        ArtifactError, match="no default chat template; name a format: llama2, llama3"
    ):
        chat_format_for(bare)
    with pytest.raises(ConfigError, match="unknown chat format 'chatml'"):
        chat_format_for(bare, "chatml")
    with pytest.raises(ArtifactError, match="no '<s>', which Llama2Format needs"):
        chat_format_for(bare, "llama2")
    with pytest.raises(ArtifactError, match="no '<|begin_of_text|>'"):
        chat_format_for(bare, "llama3")
    named = [{"name": "tools", "template": "T"}, {"name": "rag", "template": "R"}]
    with pytest.raises(ArtifactError, match="llama2, llama3, rag, tools"):
        chat_format_for(make("smollm", named))
    assert chat_format_for(make("smollm", named), "rag").render(chat("a")) == "R"
    with_default = [*named, {"name": "default", "template": "D"}]
    assert chat_format_for(make("smollm", with_default)).render(chat("a")) == "D"
    for broken in (5, [1], [{"name": "x"}], {"a": "b"}):
        with pytest.raises(ArtifactError, match="chat_template is neither"):
            chat_templates_of({"chat_template": broken})


@pytest.mark.covers("B16")
def test_where_templates_are_found(tmp_path):
    """In transformers' order: a file of its own, chat_template.json, tokenizer_config.json."""
    (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    assert load_tokenizer(tmp_path).chat_template is None
    for name, content in (
        ("tokenizer_config.json", '{"chat_template": "A"}'),
        ("chat_template.json", '{"chat_template": "B"}'),
        ("chat_template.jinja", "C"),
    ):
        (tmp_path / name).write_text(content)
        expected = content if content == "C" else json.loads(content)["chat_template"]
        assert load_tokenizer(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ArtifactError, match="chat_template.jinja is not UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.covers("B16")
@pytest.mark.parametrize(
    "source, error, message",
    [
        ("{% if %}", ArtifactError, "in line 1: TemplateSyntaxError"),
        ("\n\n{{ a", ArtifactError, "in line 3"),
        ("{{ nonsense }}", ArtifactError, "'nonsense' is undefined"),
        ("{{ messages[0].name }}", ArtifactError, "has no attribute 'name'"),
        ("{{ 'a' ~ messages[7] }}", ArtifactError, "fails"),
        ("{{ 1 / 0 }}", ArtifactError, "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", ArtifactError, "TypeError"),
        ("{{ 'a' | nofilter }}", ArtifactError, "No filter named"),
        ("{{ raise_exception('No <a>!') }}", DataError, "refuses the messages: No <a>!"),
    ],
)
def test_broken_templates(make, source, error, message):
    tokenizer = make("smollm", "x")
    tokenizer.chat_templates["broken"] = source
    with pytest.raises(error, match=message):
        chat_format_for(tokenizer, "broken").encode_chat(chat("a"))


def test_what_transformers_allows_in_templates(make):
    """Undefined names may be tested, tags have loop controls, JSON keeps its characters."""
    source = (
        "{%- if tools %}T{% endif %}{% if no_such_name is defined or no_such_name %}N{% endif -%}\n"
        "{%- for m in messages %}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {%- generation %}\n"
        "    {{- m | tojson }}{{ m.tool_calls | default('-') }}\n"
        "    {%- endgeneration %}\n"
        "{%- endfor %}{{ strftime_now('%Y')[:2] }}"
        "\n    {% if true %}\nblock{% endif %}\n  end"
    )
    form = chat_format_for(make("smollm", source))
    theirs = make("smollm", source, twin=True)
    messages = chat("<é> & \"'", "b")
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert form.render(messages, False) == expected
    assert expected.startswith('{"role": "user", "content": "<é> & ')


@pytest.mark.covers("B17")
@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "non-empty list"),
        (None, "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user", "content": "a"}, "non-empty list"),
        ([*chat("a", "b"), {"role": "user"}], "message 2: expected the keys role and content"),
        ([{"content": "a"}], "message 0: expected the keys"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "message 0: expected the keys"),
        (["a"], "message 0: expected the keys"),
        ([{"role": "owner", "content": "a"}], "message 0: role 'owner'"),
        ([{"role": ["user"], "content": "a"}], "message 0: role"),
        ([{"role": None, "content": "a"}], "message 0: role None"),
        ([*chat("a", "b"), {"role": "user", "content": None}], "message 2: content is None"),
        ([{"role": "user", "content": ["a"]}], "message 0: content is"),
        ([{"role": "user", "content": 5}], "message 0: content is 5"),
        ([{"role": "user", "content": "\udc80"}], "message 0: lone surrogate"),
        (chat("a", system="s") + chat(system="t"), "message 2: a system message can only"),
        (chat(system="s") + chat(system="t"), "message 1: a system message can only"),
        (chat("a", "b"), "message 1 is the assistant's and the last"),
    ],
)
def test_bad_messages(make, messages, message):
    for form in (
        chat_format_for(make("smollm", make.smollm_template)),
        chat_format_for(make("llama3", None), "llama3"),
    ):
        for call in (form.encode_chat, form.render):
            with pytest.raises(DataError, match=message):
                call(messages)


@pytest.mark.covers("B18")
def test_exactly_one_bos(make):
    body = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for kind in ("llama2", "llama3"):
        with_bos = chat_format_for(make(kind, "{{ bos_token }}" + body))
        without = chat_format_for(make(kind, body))
        bos_id = with_bos.tokenizer.bos_id
        for form in (with_bos, without):
            ids = form.encode_chat(chat("the cat"))
            assert ids[0] == bos_id and ids.count(bos_id) == 1
    for name in ("llama2", "llama3"):
        form = chat_format_for(make(name, None), name)
        assert form.encode_chat(chat("a")).count(form.tokenizer.bos_id) == 1
    smollm = chat_format_for(make("smollm", body))
    assert smollm.tokenizer.bos_id not in smollm.encode_chat(chat("a"))
