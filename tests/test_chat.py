"""chat.py: the conversation and its cache, in this process; the program, by pipe and by terminal."""

import copy
import functools
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from datetime import datetime

import jax
import pytest

import chat as program
import sampling
from generate import DEFAULT_QUESTION
from models.llama.chat_format import chat_format_for
from models.llama.chat.conversation import Conversation
from models.llama.generation import Generation
from models.llama.load import Model, load_checkpoint
from models.llama.model import LLaMa, for_decoding
from models.llama.tokenizer import load_tokenizer
from tests import cli
from utils.console.terminal import Answer
from utils.errors import DataError, SamplingError

TINY = ["--ckpt_dir", str(cli.checkpoint()), "--max_gen_len", "12", "--temperature", "0"]
# Answers that do not end by themselves while a test waits.
ENDLESS = ["--ckpt_dir", str(cli.checkpoint(32768)), "--max_gen_len", "15000", "--temperature", "0"]


@functools.cache
def model(context=256):
    folder = cli.checkpoint(context)
    config, params = load_checkpoint(folder, dtype="float32")
    return Model(LLaMa(config), for_decoding(params), load_tokenizer(folder))


def conversation(context=256, max_gen_len=10, sampler=sampling.TopP(0.0), long=False):
    of = model(32768) if long else model()
    chat = Conversation(of, chat_format_for(of.tokenizer), context, jax.random.key(0))
    chat.sampler, chat.max_gen_len = sampler, max_gen_len
    return chat


def ask(chat, text):
    return "".join(chat.answer(text))


def encode(messages):
    return chat_format_for(model().tokenizer).encode_chat(messages)


@pytest.fixture
def passes(monkeypatch):
    """The prompts given to Generation.start, and what the cache held at that time."""
    seen, start = [], Generation.start

    def spy(self, prompts, *, cache=None, **options):
        held = 0 if cache is None else int(cache.lengths[0])
        seen.append((held, list(prompts[0])))
        return start(self, prompts, cache=cache, **options)

    monkeypatch.setattr(Generation, "start", spy)
    return seen


# The conversation -------------------------------------------------------------------------------


@pytest.mark.covers("C10")
def test_only_new_tokens_are_read_and_the_answers_are_those_of_a_new_conversation(passes):
    chat = conversation()
    known = 0
    for text in ("one", "two", "three"):
        before = list(chat.messages)
        said = ask(chat, text)
        whole = encode([*before, {"role": "user", "content": text}])
        assert passes[-1] == (known, whole[known:])
        # The last token of an answer has been drawn and not been read.
        known = len(whole) + 10 - 1
        assert chat.tokens == known and chat.answer_tokens == 10
        assert chat.messages == [
            *before,
            {"role": "user", "content": text},
            {"role": "assistant", "content": said},
        ]
    fresh = conversation()
    fresh.messages = before
    assert ask(fresh, "three") == said
    assert passes[-1] == (0, whole)


def test_another_system_message_or_a_shorter_conversation_uses_what_is_still_right(passes):
    chat = conversation()
    chat.set_system("abc")
    first = ask(chat, "one")
    assert "".join(chat.regenerate()) == first
    assert passes[-1][0] == len(passes[0][1]) - 1  # one token has to be read to go on from
    chat.set_system("abd")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "abd"}]
    other = ask(chat, "one")
    held, read = passes[-1]
    assert held == encode(chat.messages[:-1]).index(model().tokenizer.encode("d")[0], 10)
    fresh = conversation()
    fresh.set_system("abd")
    assert ask(fresh, "one") == other
    chat.set_system(None)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


@pytest.mark.covers("R4")
def test_a_saved_conversation_keeps_its_moment(tmp_path):
    """A template that writes the date writes that of the day on which the conversation began."""
    dated, file = copy.copy(model().tokenizer), tmp_path / "said.json"
    dated.chat_templates = {"default": "{{ strftime_now('%d %b %Y %f') }}{{ messages }}"}
    began, chat = datetime(2030, 1, 1, 23, 59, 59, 7), conversation()
    chat.format = chat_format_for(dated, moment=began)
    chat.messages = [{"role": "user", "content": "one"}]
    program._save(str(file), chat)
    later = conversation()
    later.format = chat_format_for(dated, moment=datetime(2030, 1, 2))
    program._load(str(file), later)
    assert later.messages == chat.messages
    ids = later.format.encode_chat(later.messages)
    assert ids == chat.format.encode_chat(chat.messages)
    assert "01 Jan 2030 000007" in dated.decode(ids)
    program._save(str(file), later)
    assert json.loads(file.read_text())["moment"] == began.isoformat()
    for wrong in ("yesterday", 7):
        file.write_text(json.dumps({"messages": [], "moment": wrong}))
        with pytest.raises(DataError, match="said.json: moment is .*, expected a time as /save"):
            program._load(str(file), later)
    assert later.messages == chat.messages
    undated = conversation()
    program._save(str(file), undated)
    assert json.loads(file.read_text()) == {"messages": []}


@pytest.mark.slow
@pytest.mark.covers("R6")
def test_a_penalty_is_over_the_whole_context_whatever_the_cache_holds():
    def talk(fresh):
        said, chat = [], conversation(sampler=sampling.TopP(0.0))

        def again(pieces):
            if fresh:
                chat._cache, chat._cached = None, []
            said.append("".join(pieces))

        again(chat.answer("abc"))
        chat.sampler = sampling.TopP(0.0, repetition_penalty=8.0)  # /set, after a turn without
        again(chat.answer("def"))
        again(chat.regenerate())
        chat.sampler = sampling.TopP(1.0, repetition_penalty=1.5)
        again(chat.answer("ghi"))
        return said

    said = talk(fresh=False)
    assert said == talk(fresh=True)
    assert not set(said[1]) & set("abcdef" + said[0])


@pytest.mark.slow
def test_the_cache_starts_with_room_and_doubles():
    chat = conversation(context=250)
    ask(chat, "one")
    assert chat._cache.capacity == 256  # as the context
    chat = conversation(context=2048, long=True)
    for said, slots in (("x", 1024), ("x" * 400, 1024), ("x" * 600, 2048)):
        ask(chat, said)
        assert chat._cache.capacity == slots


def test_regenerate_draws_another_answer():
    chat = conversation(sampler=sampling.TopP(1.0))
    first = ask(chat, "one")
    second = "".join(chat.regenerate())
    assert first != second
    assert [m["content"] for m in chat.messages] == ["one", second]
    with pytest.raises(DataError, match="no message"):
        conversation().regenerate()


def test_a_full_context_drops_whole_oldest_turns_and_keeps_the_system_message(passes):
    chat = conversation(context=200, max_gen_len=20)
    chat.set_system("Be brief.")
    said, dropped = [], []
    for text in ("first", "second", "third", "fourth"):
        said.append(ask(chat, text))
        dropped.append(chat.dropped)
        held, read = passes[-1]
        assert held + len(read) + 20 <= 200
    assert dropped[:2] == [0, 0] and sum(dropped) >= 2 and all(n % 2 == 0 for n in dropped)
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert [m["role"] for m in chat.messages[1:]] == ["user", "assistant"] * (4 - sum(dropped) // 2)
    assert chat.messages[-1]["content"] == said[-1]
    fresh = conversation(context=200, max_gen_len=20)
    fresh.messages = chat.messages[:-2]
    assert ask(fresh, "fourth") == said[-1]


@pytest.mark.covers("C1")
def test_an_error_leaves_the_conversation_as_it_was():
    chat = conversation(context=120)
    first = ask(chat, "one")
    before = list(chat.messages)
    with pytest.raises(
        SamplingError, match=r"takes 2\d\d tokens and an answer 10.* context of 120"
    ):
        ask(chat, "x" * 200)
    with pytest.raises(DataError, match="surrogate"):
        ask(chat, "\ud800")
    assert chat.messages == before
    assert "".join(chat.regenerate()) == first


def test_a_broken_cache_is_not_used_again(monkeypatch, passes):
    chat = conversation()
    ask(chat, "one")
    before = list(chat.messages)
    advance = Generation.advance

    def fail(self, steps=None):
        raise SamplingError("logits are not finite")

    monkeypatch.setattr(Generation, "advance", fail)
    with pytest.raises(SamplingError):
        ask(chat, "two")
    assert chat.messages == before and chat.tokens == 0
    monkeypatch.setattr(Generation, "advance", advance)
    ask(chat, "two")
    assert passes[-1][0] == 0


@pytest.mark.covers("C11")
def test_an_answer_that_is_stopped_stays_as_far_as_it_came(passes):
    chat = conversation(max_gen_len=30)
    pieces = chat.answer("one")
    said = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert chat.tokens == len(passes[0][1]) + 2  # the last of three tokens was not read yet
    answer = ask(chat, "two")
    fresh = conversation(max_gen_len=30)
    fresh.messages = chat.messages[:-2]
    assert ask(fresh, "two") == answer


@pytest.mark.covers("R37")
def test_an_empty_system_message_is_a_message(tmp_path):
    for args, typed, empty in (
        ([], "", False),
        (["--system", ""], "", True),
        ([], '/system ""\n', True),
        (["--system", "x"], "/system\n", False),
    ):
        file = tmp_path / "said.json"
        cli.inside("chat.py", *TINY, "--max_gen_len=1", *args, input=f"{typed}one\n/save {file}\n")
        messages = json.loads(file.read_text())["messages"]
        assert messages[:-2] == [{"role": "system", "content": ""}] * empty
        if not typed:
            chat = ("--chat", "--prompt=one", "--json", "--max_gen_len=0")
            by_generate = cli.inside("generate.py", *TINY, *chat, *args)
            ids = json.loads(by_generate.stdout)["prompt_tokens"]
            assert ids == encode(messages[:-1])


def test_a_message_can_be_taken_back():
    chat = conversation()
    chat.messages = [{"role": "system", "content": "x"}]
    ask(chat, "one")
    before = list(chat.messages)
    ask(chat, "two")
    assert chat.undo() == "two" and chat.messages == before
    assert chat.undo() == "one" and len(chat.messages) == 1
    with pytest.raises(DataError, match="no message"):
        chat.undo()


# The program, with stdin piped ------------------------------------------------------------------


def run(text, *args, **options):
    data = text if isinstance(text, bytes) else text.encode()
    done = cli.run("chat.py", *(args or TINY), input=data, text=False, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def test_messages_and_commands_by_pipe(tmp_path):
    saved = tmp_path / "conversation.json"
    done = cli.inside(
        "chat.py",
        *TINY,
        input=f"one\n\n/save {saved}\n/reset\none\n/regen\n/help\n/set temperature 1.5\n/set\n"
        f'/set max_gen_len 0\n/system Be brief.\nfirst \\\nsecond\n"""\n/not a command\n\n  x\n"""\n'
        f"/save {tmp_path / 'second.json'}\n/load {saved}\n/set max_gen_len 3\n/quit\nnever read",
    )
    assert done.returncode == 0, done.stderr
    first, second = (
        json.loads((tmp_path / f"{name}.json").read_text())["messages"]
        for name in ("conversation", "second")
    )
    assert [m["role"] for m in first] == ["user", "assistant"] and first[0]["content"] == "one"
    # Greedy: the same answer again after /reset and /regen; then two empty ones.
    assert done.stdout == (first[1]["content"] + "\n") * 3 + "\n\n"
    assert [m["content"] for m in second if m["role"] == "user"] == [
        "one",
        "first \nsecond",
        "/not a command\n\n  x",
    ]
    assert second[0] == {"role": "system", "content": "Be brief."}
    assert "temperature 1.5: divides the logits" in done.stderr
    assert "top_k 0: " in done.stderr and "max_gen_len 12: " in done.stderr
    assert "/regen" in done.stderr and "> " not in done.stdout
    assert f"2 messages written to {saved}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.covers("B9", "C13", "N10")
def test_an_error_ends_a_piped_chat_with_its_code():
    cases = [
        ("/nonsense\n", 2, "unknown command /nonsense; /help lists them"),
        ("/set temperature\n", 2, "/set temperature needs a value"),
        ("/set foo 3\n", 2, "/set has no 'foo'; it has temperature, top_p, top_k, min_p, rep"),
        ("/set temperature -1\n", 2, "/set temperature must be a number of at least 0, got -1"),
        ("/set max_gen_len 1.5\n", 2, "/set max_gen_len must be an integer of at least 0, got"),
        ("/load /nonexistent/file\n", 4, "/nonexistent/file"),
        ("/save\n", 2, "/save needs a file"),
        ("x" * 300, 2, "exceeds the context of 256"),
        (b"\n\xff\n", 4, "line 2 of stdin is not UTF-8: byte 0xff at offset 0"),
    ]
    for text, code, reason in cases:
        done = cli.inside("chat.py", *TINY, input=text)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (code, 1, "")
        assert done.stderr.startswith("error: ") and reason in done.stderr
    done = run(b"\n\xff\n")
    assert (done.returncode, done.stderr) == (4, f"error: {reason}\n")


def test_the_end_of_the_input_ends_a_message():
    texts = ("one\n", '"""\none', "")
    whole, block, empty = (cli.inside("chat.py", *TINY, input=text) for text in texts)
    assert whole.stdout == block.stdout and len(whole.stdout) > 1
    assert (empty.stdout, empty.returncode) == ("", 0)


@pytest.mark.covers("C11")
def test_interrupt_stops_a_piped_answer_and_the_conversation_goes_on():
    process = subprocess.Popen(
        cli.command("chat.py", *ENDLESS),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cli.environment(),
        bufsize=0,
    )
    process.stdin.write(b"hello\n")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/set max_gen_len 5\nagain\n")
    process.stdin.close()
    out, error = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 0 and error == b""
    assert out.count(b"\n") >= 2 and len(out) < 30000


# The program, in a terminal ---------------------------------------------------------------------


class TerminalOf:
    """A program in a pseudo-terminal of its own, and what it has shown so far."""

    def __init__(self, *command, environment):
        self.fd, inside = os.openpty()
        self.settings = termios.tcgetattr(inside)
        # A process becomes the leader of its terminal after the fork, so it needs a helper.
        lead = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", lead, str(inside), *command],
            pass_fds=[inside],
            env=environment | {"TERM": "xterm", "COLUMNS": "200"},
        )
        self.inside, self.text = inside, ""

    def wait_for(self, pattern, seconds=90):
        """Reads on until the text since the last call matches; returns that text."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"no {pattern} in {self.text!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        shown, self.text = self.text, ""
        return shown

    def type(self, text):
        time.sleep(0.2)  # readline misses a signal just after it has written the prompt
        os.write(self.fd, text.encode())

    def wait_for_end(self):
        """The exit code; the terminal has to be as it was."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.text!r}"
            if select.select([self.fd], [], [], 0.05)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        assert termios.tcgetattr(self.inside) == self.settings
        os.close(self.inside)
        return self.process.returncode


STATUS = r"(\d+) tokens?, [\d.]+ tok/s; (\d+) of (\d+) tokens used"


@pytest.mark.slow
@pytest.mark.covers("C11", "R40", "N6", "N7")
def test_a_conversation_in_a_terminal(tmp_path):
    home = {"XDG_STATE_HOME": str(tmp_path)}
    terminal = TerminalOf(*cli.command("chat.py", *ENDLESS), environment=cli.environment() | home)
    terminal.wait_for("> $")
    terminal.type("hello\n")
    terminal.wait_for("[!-~]{120}")
    terminal.type("typed in advance")
    terminal.type("\x03")
    shown = terminal.wait_for("> typed in advance$")
    assert re.search("stopped; " + STATUS, shown)
    assert shown.count("advance") == 1 and "^C" not in shown
    terminal.type("\x15/set max_gen_len 4\n")
    assert "max_gen_len is 4" in terminal.wait_for("4\r\n.*> $")
    pastes = ("one\ntwo\n\n/three", "\x1b[200~/* one */\n  two\n\x1b[201~", "a\\\nb\nc")
    for paste in pastes:
        terminal.type(paste)
        terminal.type("\n")
        assert len(re.findall(STATUS, terminal.wait_for(STATUS + "(?s:.)*> $"))) == 1
    terminal.type(f"/save {tmp_path / 'said.json'}\n")
    terminal.wait_for("> $")
    messages = json.loads((tmp_path / "said.json").read_text())["messages"]
    said = [m["content"] for m in messages if m["role"] == "user"]
    assert said == ["hello", "one\ntwo\n\n/three", "/* one */\n  two", "a\\\nb\nc"]
    terminal.type("/und\t\n")
    assert "taken back, with its answer: 'a" in terminal.wait_for("> $")
    terminal.type("again\n")
    count, used, context = re.search(STATUS, terminal.wait_for("> $")).groups()
    assert int(count) <= 4 and int(used) > 100 and context == "32768"
    terminal.type("/bad\n")
    assert "\x1b[31merror: unknown command /bad" in terminal.wait_for("> $")
    terminal.type("half a line\x03")
    assert "type /quit to leave" in terminal.wait_for("> $")
    terminal.type("\x1b[A\x1b[A\n")  # cursor up twice, in the history: "again"
    assert "again" in terminal.wait_for(STATUS + "(?s:.)*> $")
    terminal.type("\x03")
    terminal.wait_for("to leave(?s:.)*> $")
    terminal.type("\x03")
    assert terminal.wait_for_end() == 130
    assert "Traceback" not in terminal.text
    history = tmp_path / "altiplano" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "hello\n" in history.read_text()


@pytest.mark.covers("N6")
def test_the_terminal_is_restored_on_every_way_out():
    """Where a signal ends the process at once, too, and by an error."""
    program = """if True:
        import os, signal, sys, time
        from utils.console import cli
        from utils.console.terminal import Lines
        with Lines([], print) as lines:
            signals = cli.Signals(leave_at=2)
            signals.leaving = lines.restore
            print("ready", flush=True)
            sys.argv[1] == "error" and 1 / 0
            time.sleep(600)
    """
    ways = {"\x03\x03": 130, "\x1c": 128 + signal.SIGQUIT, "term": 128 + signal.SIGTERM, "error": 1}
    terminals = {
        way: TerminalOf(sys.executable, "-c", program, way[:5], environment=cli.environment())
        for way in ways
    }
    for way, terminal in terminals.items():
        terminal.wait_for("ready")
        if way == "term":
            terminal.process.terminate()
        for key in way if len(way) < 3 else ():
            terminal.type(key)
        assert terminal.wait_for_end() == ways[way]


def test_an_answer_breaks_its_lines_between_words(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Screen())
    answer, text = Answer(), "Once upon a time, in\n\na " + "very" * 9 + " long 世界 land far away."
    for i in range(0, len(text), 3):
        answer.write(text[i : i + 3])
    lines = [[]]
    for code, back, c in re.findall(r"(\x1b\[(\d+)D\x1b\[K)|((?s:.))", sys.stdout.getvalue()):
        if code:  # the cells of a word that moves
            del lines[-1][-int(back) :]
        elif c == "\n":
            lines.append([])
        else:
            lines[-1].append(c)
    shown = ["".join(line) for line in lines]
    assert shown[:3] == ["Once upon a", "time, in", ""]
    # A word longer than half a line is not moved.
    assert shown[3:7] == ["a veryveryv", "eryveryvery", "veryveryver", "yvery long "]
    assert shown[7:] == ["世界 land ", "far away."]


@pytest.mark.slow
def test_two_turns_with_the_default_model(default_model_path):
    cli.share_default_model(default_model_path)
    # A cache of as many slots as generate.py takes for the first question: one compilation less.
    args = ["--temperature", "0", "--max_seq_len", "384", "--max_gen_len", "120"]
    terminal = TerminalOf(
        *cli.command("chat.py", *args), environment=cli.environment(optimized=True)
    )
    assert "smollm2-135m-instruct · /help lists the commands" in terminal.wait_for("> $")
    used = []
    for question, answer in ((DEFAULT_QUESTION, "Paris"), ("And of Italy?", "Rome")):
        terminal.type(question + "\n")
        shown = terminal.wait_for(STATUS + "(?s:.)*> $")
        used.append(int(re.search(STATUS, shown)[2]))
        assert answer in shown
    assert used == sorted(used)
    terminal.type("\x04")
    assert terminal.wait_for_end() == 0
