"""Standard evaluations: requests and tasks of lm-eval, next to its own Hugging Face model."""

import functools
import importlib
import json
import re
import shutil
import sys

import datasets
import huggingface_hub
import lm_eval
import numpy as np
import pytest
import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import evaluate
from models.llama.chat_format import ChatFormat
from models.llama.load import DecodingModelFlags, Model
from tests import cli
from trainers.evaluation import harness
from trainers.evaluation.lm import AltiplanoLM, _score
from utils.console import cli as console
from utils.errors import ArtifactError, ConfigError, DataError, SamplingError

WORDS = "the cat sat on mat and then it went far over hills".split()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The tiny checkpoint, with BOS written where transformers 5 looks for it."""
    path = tmp_path_factory.mktemp("lm_eval") / "model"
    shutil.copytree(cli.checkpoint(), path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def ours(path):
    return AltiplanoLM(path, batch_size=8)


@pytest.fixture(scope="module")
def theirs(path):
    return HFLM(str(path), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch):
    """Its own 14,000 files of tasks take seconds to read; what it says of this machine too."""
    alone = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", alone)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    for place in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)


def ask(lm, kind, arguments):
    """A model's answers to requests of one kind."""
    given = enumerate(arguments)
    requests = [Instance(kind, doc={}, arguments=args, idx=i) for i, args in given]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def text(n, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def same_loglikelihoods(ours, theirs, arguments):
    got, wanted = (ask(lm, "loglikelihood", arguments) for lm in (ours, theirs))
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in wanted], rtol=0, atol=1e-4)
    assert [x[1] for x in got] == [x[1] for x in wanted]
    return got


def test_loglikelihoods(ours, theirs):
    # Five continuations of a context are two rows; lengths differ, and so do numbers of branches.
    asked = [(text(9, n), " " + text(m, n)) for n in range(2) for m in (1, 2, 1, 3, 2)]
    asked += [("", "hello"), ("", "<s>hello"), ("two  ", "words"), ("Q\n\n", "A"), ("Q", " A")]
    asked += [("<s>one", "y"), ("a<|im_end|>b", "c"), ("a<|im_start|>", "<|im_end|>")]
    greedy = ask(theirs, "generate_until", [(text(4), {"max_gen_toks": 5})])[0]
    asked += [(text(4), greedy), (text(4), greedy[:2]), (text(4), greedy[:2] + "Q")]
    got = same_loglikelihoods(ours, theirs, asked)
    assert [answer for _, answer in got[-3:]] == [True, True, False]
    # The order of requests and their neighbours make no difference.
    np.testing.assert_allclose(
        *([x[0] for x in found] for found in (ask(ours, "loglikelihood", asked[::-1])[::-1], got)),
        rtol=1e-5,
    )


@pytest.fixture
def short(path, ours):
    """Both with a context of 16 tokens."""
    theirs = HFLM(str(path), device="cpu", dtype="float32", batch_size=4, max_length=16)
    return AltiplanoLM(ours.model, batch_size=8, max_length=16), theirs


@pytest.mark.covers("C19")
def test_what_is_longer_than_the_context_is_cut_on_the_left(short):
    asked = [(text(4), " " + text(m)) for m in (1, 2)] + [("ab", "y" * 16), ("x" * 15, "y")]
    with pytest.warns(UserWarning, match="3 requests with more tokens than the context of 16"):
        same_loglikelihoods(*short, asked)
    for continuation, n in (("", 0), ("y" * 17, 17)):
        message = f"a continuation of {n} tokens, expected 1 to 16, .* it follows '<s>ab'"
        with pytest.raises(DataError, match=message):
            ask(short[0], "loglikelihood", [("ab", continuation)])


def test_texts_longer_than_the_context_in_windows(short):
    asked = [(text(n, n),) for n in (1, 3, 4, 9)] + [("",), ("x" * 16,), ("x" * 15,)]
    got, wanted = (ask(lm, "loglikelihood_rolling", asked) for lm in short)
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-4)


@pytest.mark.covers("C19")
def test_completions(path, ours, theirs):
    # Prompts of 33 to 48 tokens: one program.
    prompts = [text(9, n)[:n] for n in (33, 40, 44)]
    whole = ask(theirs, "generate_until", [(prompts[0], {"max_gen_toks": 12})])[0]
    asked = [(prompt, {"until": ["Q"], "max_gen_toks": 12}) for prompt in prompts]
    stops = [whole[4:6], whole[8]]
    asked += [(prompts[0], {"until": stops, "max_gen_toks": 12, "do_sample": False})]
    asked += [(prompts[0], {"until": "\n\n", "max_new_tokens": 12, "num_beams": 1})]
    got, wanted = (ask(lm, "generate_until", asked) for lm in (ours, theirs))
    assert got == wanted and len(got[3]) < 12
    short = AltiplanoLM(ours.model, batch_size=8, max_length=60)
    hf = HFLM(str(path), device="cpu", dtype="float32", max_length=60)
    with pytest.warns(UserWarning, match="1 request with more tokens than the context of 60"):
        got = ask(short, "generate_until", [(text(20), {"max_gen_toks": 12})])
    assert got == ask(hf, "generate_until", [(text(20), {"max_gen_toks": 12})])
    with pytest.raises(ConfigError, match="max_gen_toks=256 leaves no room .* context of 256"):
        ask(ours, "generate_until", [("a", {})])
    # Equal prompts that are sampled get draws of their own.
    drawn = [(prompts[0], {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 2
    one, two = ask(ours, "generate_until", drawn)
    assert one != two and [one, two] == ask(ours, "generate_until", drawn)


@pytest.mark.covers("C20")
def test_settings_and_weights_that_cannot_be_right(ours):
    with pytest.raises(ConfigError, match="generation_kwargs: penalty_alpha is not known"):
        ask(ours, "generate_until", [("a", {"penalty_alpha": 0.6, "max_gen_toks": 8})])
    llama, params, tokenizer = ours.model
    broken = Model(llama, params | {"final_norm": params["final_norm"] * np.nan}, tokenizer)
    with pytest.raises(SamplingError, match="log-likelihoods are not finite") as error:
        ask(AltiplanoLM(broken, batch_size=8), "loglikelihood", [("a", "b")])
    assert error.value.exit_code == 5


def test_texts_and_conversations_have_the_same_tokens(ours, theirs, monkeypatch):
    for string in ("hello", "<s>x", "", "a<|im_end|>\n"):
        for special in (None, True, False):
            assert ours.tok_encode(string, special) == theirs.tok_encode(string, special)
    asked = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi "}]
    assert ours.apply_chat_template(asked) == theirs.apply_chat_template(asked)
    for answer in ("Answer:", "Answer: "):
        opened = [*asked, {"role": "assistant", "content": answer}]
        assert ours.apply_chat_template(opened, False) == theirs.apply_chat_template(opened, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    # A template that refuses a system message gets none.
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    source = refuses + ours.tokenizer.chat_template
    monkeypatch.setattr(theirs.tokenizer, "chat_template", source)
    monkeypatch.setitem(vars(ours), "chat", ChatFormat(ours.tokenizer, source))
    with pytest.warns(UserWarning, match="refuses a system message: it is left out"):
        assert ours.apply_chat_template(asked) == theirs.apply_chat_template(asked)
    names = "eot_token_id", "prefix_token_id", "max_length", "max_gen_toks"
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]


def test_a_context_is_computed_once_and_few_programs_are_made(ours, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "trainers.evaluation.lm._score",
        lambda llama, params, arrays: seen.append(arrays) or _score(llama, params, arrays),
    )
    ask(
        ours, "loglikelihood", [(text(9, n), " " + text(m)) for n in range(5) for m in (1, 2, 3, 1)]
    )
    # Five contexts of four continuations, two and two at once; the last batch is filled up.
    assert [arrays[0].shape for arrays in seen] == [(2, 64)] * 3
    assert [arrays[2].shape for arrays in seen] == [(2, 4, 16)] * 3


ROWS = [
    {"q": f"What is {a} plus {b}?", "choices": [str(a + b), "ten", "no sum at all"], "gold": a % 3}
    for a in range(3)
    for b in range(2)
]
HEAD = """
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: train
doc_to_text: "{{{{q}}}}"
"""
TASKS = {
    "sums": "output_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]",
    "texts": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{q}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    "answers": 'output_type: generate_until\ndoc_to_target: "{{choices[0]}}"\n'
    "generation_kwargs: {until: [x], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks of every kind, on rows of a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    head = HEAD.format(data=folder / "rows.jsonl", cache=folder / "cache")
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{head}{body}\n")
    (folder / "all.yaml").write_text(
        "group: all_of_them\ntask: [sums]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


@pytest.fixture
def command(path, tasks, monkeypatch, capsys):
    """Runs `evaluate.py lm_eval` in this process; returns what it wrote."""
    monkeypatch.setattr(console, "Signals", lambda **_: None)
    monkeypatch.setattr(console, "keep_compilations", lambda: None)

    def run(names, **flags):
        given = dict(include_path=str(tasks), batch_size=8, limit=4) | flags
        evaluate.lm_eval(
            tasks=evaluate.HarnessFlags(tasks=names, **given),
            model=DecodingModelFlags(ckpt_dir=str(path)),
            processes=console.ProcessFlags(),
        )
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tasks_have_the_results_of_lm_evals_own_model(command, theirs, tasks, tmp_path, chat):
    names, flags = ["sums", "answers"], dict(num_fewshot=1, limit=4)
    if chat:
        flags |= dict(apply_chat_template=True, system_instruction="Be brief.")
    else:
        names.append("texts")
    page = command(",".join(names), output=str(tmp_path / "out.json"), **flags)
    written = json.loads((tmp_path / "out.json").read_text())
    wanted = lm_eval.simple_evaluate(
        model=theirs, tasks=names, task_manager=TaskManager(include_path=str(tasks)), **flags
    )
    assert written["results"].keys() == set(names)
    for name in names:
        for measure, value in wanted["results"][name].items():
            got = written["results"][name][measure]
            assert got == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))
    assert re.search(r"^\|sums +\|Yaml +\|none +\| +1\|acc +\|↑ +\| *\d\.\d+\|±", page, re.M)
    assert written["config"]["model"] == "AltiplanoLM" and written["n-shot"]["sums"] == 1
    assert {"pretrained"} == written["config"]["model_args"].keys()


def test_a_group_a_pattern_and_the_list_of_names(command):
    page = command("all_*", limit=2)
    assert "|Tasks|" in page.replace(" ", "") and "|Groups" in page.replace(" ", "")
    assert command("list").split() == ["all_of_them", "answers", "sums", "texts"]


def test_ones_own_program_finds_the_model_by_its_name(path):
    assert get_model("altiplano") is AltiplanoLM
    arguments = f"pretrained={path},max_length=32", {"batch_size": "auto", "device": None}
    made = AltiplanoLM.create_from_arg_string(*arguments)
    assert (made.max_length, made.batch_size) == (32, 16)


@pytest.mark.covers("C15")
def test_names_and_files_that_are_wrong(command, tasks, tmp_path):
    with pytest.raises(ConfigError, match="no task 'summs'; did you mean sums"):
        command("texts,summs")
    with pytest.raises(ConfigError, match="no task 'q'; --tasks list names them"):
        command("q")
    with pytest.raises(ConfigError, match="--include_path .*rows.jsonl: expected a folder"):
        command("sums", include_path=str(tasks / "rows.jsonl"))
    with pytest.raises(DataError, match="cannot load '.*nothing.yaml': KeyError"):
        command(str(tmp_path / "nothing.yaml"))
    (tmp_path / "broken.yaml").write_text("task: [\n")
    with pytest.raises(DataError, match="cannot load '.*broken.yaml'"):
        command(str(tmp_path / "broken.yaml"))
    with pytest.raises(ConfigError, match="--output .*: cannot write into the folder"):
        command("sums", output=str(tmp_path / "no" / "out.json"))


@pytest.mark.covers("C16")
def test_data_that_cannot_be_had(command, tasks, tmp_path):
    body = (tasks / "sums.yaml").read_text()
    (tmp_path / "gone.yaml").write_text(body.replace("rows.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match="cannot load '.*gone.yaml': FileNotFoundError"):
        command(str(tmp_path / "gone.yaml"))
    (tmp_path / "far.yaml").write_text(re.sub("json$", "someone/something", body, 1, re.M))
    with pytest.raises(DataError, match="cannot load .*someone/something.*Hugging Face hub"):
        command(str(tmp_path / "far.yaml"))


@pytest.mark.covers("C16")
def test_more_examples_than_a_task_has(command):
    with pytest.raises(DataError, match="fails on 'sums': ValueError: Sample larger than pop"):
        command("sums", num_fewshot=100)


@pytest.mark.covers("C17")
def test_without_lm_eval_the_extra_is_named(command, monkeypatch):
    for name in ("trainers.evaluation.harness", "trainers.evaluation.lm"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("trainers.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'altiplano\[eval\]'"):
        command("sums")


@pytest.mark.covers("C18")
def test_tasks_of_images_and_of_code(command, tasks, tmp_path):
    body = (tasks / "answers.yaml").read_text()
    (tmp_path / "code.yaml").write_text(body + "unsafe_code: true\n")
    with pytest.raises(ConfigError, match="answers runs code .*--confirm_run_unsafe_code"):
        command(str(tmp_path / "code.yaml"))
    assert harness.Tasks(unsafe_code=True).load([str(tmp_path / "code.yaml")])["tasks"]
    (tmp_path / "images.yaml").write_text(body + "doc_to_image: q\n")
    with pytest.raises(ConfigError, match="answers shows images"):
        command(str(tmp_path / "images.yaml"))


def test_templates_are_for_chats(command, ours, path):
    with pytest.raises(ConfigError, match="--chat_format and --template_args need --apply_chat"):
        evaluate.HarnessFlags(tasks="sums", chat_format="llama3")
    with pytest.raises(
        ArtifactError, match="the tokenizer has no '<|begin_of_text|>'".replace("|", r"\|")
    ):
        command("sums", apply_chat_template=True, chat_format="llama3")


def test_the_hubs_metrics_are_found_beside_the_script_of_their_name(monkeypatch):
    assert evaluate.COMMANDS
    with harness._metrics_of_the_hub():
        found = importlib.util.find_spec("evaluate")
        assert found.origin.endswith("evaluate/__init__.py")
    assert sys.modules["evaluate"] is evaluate
