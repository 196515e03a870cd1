"""HfTokenizer: by itself on small templates, and against transformers on the demo model and odd templates."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinjet.engines.base import ChatTurn
from twinjet.errors import ConfigError, InvalidRequest, Unsupported
from twinjet.models.demo import find_gguf
from twinjet.models.gguf import GgufFile
from twinjet.models.tokenizer import HfTokenizer

LLAMA_LIKE = (
    "{{- bos_token }}\n"
    "{%- for m in messages %}\n"
    "    {%- if m.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('role ' + m.role + ' is not allowed') }}\n"
    "    {%- endif %}\n"
    "    {{- '<' + m['role'] + '>' + m['content'] | trim + '</s>' }}\n"
    "    {%- if loop.index > 50 %}{% break %}{% endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TRACKED = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %};"
    "{% else %}{{ m | tojson(indent=1) }};{% endif %}"
    "{% endfor %}"
)
SPACED = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}{{ eos_token }}"
TEMPLATES = {"llama-like": LLAMA_LIKE, "tracked": TRACKED, "spaced": SPACED}

CONTENTS = [
    "Hi",
    "",
    "  two  spaces  ",
    "line\n\nline\n",
    "日本語 🦜 é",
    "<|im_end|> {{ x }} <b>&amp;",
    "tail \t",
]


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path) -> HfTokenizer:
    return HfTokenizer(demo_model_path)


def conversations() -> list[list[ChatTurn]]:
    chats = [[ChatTurn("user", c)] for c in CONTENTS]
    chats += [[ChatTurn("system", a), ChatTurn("user", b)] for a, b in product(CONTENTS[:4], CONTENTS)]
    chats += [
        [ChatTurn("user", "q"), ChatTurn("assistant", a), ChatTurn("user", b)]
        for a, b in product(CONTENTS, CONTENTS)
    ]
    return chats


def with_template(demo: Path, folder: Path, template: object, **config: object) -> Path:
    """The demo model's tokenizer under another template."""
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(demo / "tokenizer.json")
    (folder / "config.json").symlink_to(demo / "config.json")
    base = json.loads((demo / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(base | {"chat_template": template} | config))
    return folder


def with_begin_token(demo: Path, folder: Path) -> Path:
    """The demo model with a tokenizer.json that puts <|im_start|> before every text."""
    with_template(demo, folder, None)
    content = json.loads((demo / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_text_survives_a_round_trip(tokenizer: HfTokenizer) -> None:
    for text in CONTENTS:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
# The model's vocabulary lacks a few control characters and the lead bytes of planes 4 to 11.
@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=200))
def test_any_text_survives_a_round_trip_inside_the_vocabulary(tokenizer: HfTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_skipped_when_asked(tokenizer: HfTokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    ids = [1, *tokenizer.encode("hello", add_special_tokens=False), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_half_a_character_shows_as_replacement(tokenizer: HfTokenizer) -> None:
    ids = tokenizer.encode("🦜", add_special_tokens=False)
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:-1], skip_special_tokens=False)


def test_digits_are_tokens_of_their_own(tokenizer: HfTokenizer) -> None:
    ids = tokenizer.encode("in 2024", add_special_tokens=False)
    assert [tokenizer.decode([i], skip_special_tokens=False) for i in ids[-4:]] == ["2", "0", "2", "4"]


def test_the_demo_chat_is_rendered_as_its_template_says(tokenizer: HfTokenizer) -> None:
    text = tokenizer.render_chat(
        [ChatTurn("system", "Be brief."), ChatTurn("user", "Hi")], continue_final=False
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    last = tokenizer.encode(text, add_special_tokens=False)
    assert last[0] == 1
    assert last.count(2) == 2


def test_a_demo_chat_without_a_system_message_gets_none(tokenizer: HfTokenizer) -> None:
    text = tokenizer.render_chat([ChatTurn("user", "Hi")], continue_final=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def authors(demo_model_path: Path) -> HfTokenizer:
    """The demo model's tokenizer with the template that the GGUF file carries."""
    template = GgufFile(find_gguf()[0]).metadata["tokenizer.chat_template"]
    assert "You are a helpful AI assistant" in template
    return HfTokenizer(demo_model_path, template=template)


@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=20))))
def test_the_demo_chat_is_the_authors_own_after_a_system_message(
    tokenizer: HfTokenizer, authors: HfTokenizer, turns: list[tuple[str, str]]
) -> None:
    """Only the default system message is gone; everything else is as the model was trained."""
    chat = [ChatTurn("system", "s"), *(ChatTurn(role, text) for role, text in turns)]
    assert tokenizer.render_chat(chat, continue_final=False) == authors.render_chat(
        chat, continue_final=False
    )


def test_continuing_ends_inside_the_last_message(tokenizer: HfTokenizer) -> None:
    turns = [ChatTurn("user", "Hi"), ChatTurn("assistant", "Well, ")]
    assert tokenizer.render_chat(turns, continue_final=True).endswith("<|im_start|>assistant\nWell, ")


def test_a_refusing_template_is_the_clients_mistake(demo_model_path: Path) -> None:
    strict = HfTokenizer(demo_model_path, template=LLAMA_LIKE)
    with pytest.raises(InvalidRequest, match="role tool is not allowed") as caught:
        strict.render_chat([ChatTurn("tool", "x")], continue_final=False)
    assert caught.value.violations[0].field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[7].content + 1 }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(demo_model_path: Path, template: str) -> None:
    with pytest.raises(InvalidRequest, match="messages: the model's chat template"):
        HfTokenizer(demo_model_path, template=template).render_chat(
            [ChatTurn("user", "x")], continue_final=False
        )


def test_a_template_that_drops_the_final_message_cannot_be_continued(demo_model_path: Path) -> None:
    dropping = HfTokenizer(demo_model_path, template="{{ messages[0].content }}")
    with pytest.raises(InvalidRequest, match="leaves out the final message"):
        dropping.render_chat([ChatTurn("user", "a"), ChatTurn("assistant", "b")], continue_final=True)


def test_a_model_without_a_template_cannot_chat(demo_model_path: Path, tmp_path: Path) -> None:
    plain = HfTokenizer(with_template(demo_model_path, tmp_path / "m", None))
    assert not plain.has_chat_template
    with pytest.raises(Unsupported):
        plain.render_chat([ChatTurn("user", "x")], continue_final=False)


def test_where_a_template_may_stand(demo_model_path: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = with_template(demo_model_path, tmp_path / "m", named)
    turn = [ChatTurn("user", "x")]
    assert HfTokenizer(folder).render_chat(turn, continue_final=False) == "D"
    (folder / "chat_template.jinja").write_text("J{{ eos_token }}")
    assert HfTokenizer(folder).render_chat(turn, continue_final=False) == "J<|im_end|>"


def test_special_tokens_may_be_objects(demo_model_path: Path, tmp_path: Path) -> None:
    folder = with_template(
        demo_model_path,
        tmp_path / "m",
        "{{ bos_token }}{{ pad_token }}",
        bos_token={"content": "<|im_start|>"},
    )
    rendered = HfTokenizer(folder).render_chat([ChatTurn("user", "x")], continue_final=False)
    assert rendered == "<|im_start|><|im_end|>"


def test_special_tokens_are_added_as_tokenizer_json_says(demo_model_path: Path, tmp_path: Path) -> None:
    folder = with_begin_token(demo_model_path, tmp_path / "m")
    tokenizer = HfTokenizer(folder)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == [1, *plain]


def test_folders_that_are_no_model_are_named(demo_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        HfTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        HfTokenizer(tmp_path)
    bad = with_template(demo_model_path, tmp_path / "m", "{% for %}")
    with pytest.raises(ConfigError, match="does not compile"):
        HfTokenizer(bad)


def test_neither_torch_nor_transformers_is_imported(demo_model_path: Path) -> None:
    program = (
        "import sys; from twinjet.models.tokenizer import HfTokenizer; from twinjet.models import demo;"
        f"HfTokenizer({str(demo_model_path)!r});"
        "sys.exit(' '.join({'torch', 'transformers', 'llm', 'grpc'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.engine
def test_token_ids_equal_those_of_transformers(
    tokenizer: HfTokenizer, demo_model_path: Path, transformers: Any
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(demo_model_path)
    texts = [*CONTENTS, "In 2024, it's 3.14159!\r\n\tdef f(x): return x**2", "a" * 5000, "<|im_start|>user\n"]
    for text, special in product(texts, (False, True)):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == theirs(text, add_special_tokens=special)["input_ids"]
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.engine
@pytest.mark.parametrize("name", ["own", *TEMPLATES])
def test_chats_are_rendered_as_transformers_does(
    demo_model_path: Path, tmp_path: Path, transformers: Any, name: str
) -> None:
    folder = demo_model_path
    if name != "own":
        folder = with_template(demo_model_path, tmp_path / "m", TEMPLATES[name])
    ours = HfTokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    compared = 0
    for turns in conversations():
        chat = [{"role": t.role, "content": t.content} for t in turns]
        assert ours.render_chat(turns, continue_final=False) == theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        compared += 1
        if turns[0].role == "user" and len(turns) == 3:
            assert ours.render_chat(turns[:2], continue_final=True) == theirs.apply_chat_template(
                chat[:2], tokenize=False, continue_final_message=True
            )
    assert compared > 80


@pytest.mark.engine
def test_begin_tokens_equal_those_of_transformers(
    demo_model_path: Path, tmp_path: Path, transformers: Any
) -> None:
    for number, (folder, expected) in enumerate(
        [
            (with_begin_token(demo_model_path, tmp_path / "own"), 2),
            (with_template(demo_model_path, tmp_path / "config", None, add_bos_token=True), 1),
        ]
    ):
        ids = HfTokenizer(folder).encode("hello", add_special_tokens=True)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert (number, ids) == (number, theirs("hello")["input_ids"])
        assert len(ids) == expected
