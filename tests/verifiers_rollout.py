"""Verifiers' own rollout, as the reference of the adapter.

Its chat program, and its servers between program, model and tools. The model at the end of the line
is a script.
"""

import asyncio
import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import verifiers.v1 as vf
import verifiers.v1.rollout
from verifiers.v1.runtimes.base import ProgramResult
from verifiers.v1.runtimes.subprocess import SubprocessRuntime


@contextlib.contextmanager
def scripted_model(replies):
    """A server of OpenAI's API that gives the replies in order. Yields (its URL, what it was told)."""
    told = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append(body)
            reply = replies[len(told) - 1]
            calls = [call | {"index": i} for i, call in enumerate(reply.get("tool_calls", []))]
            delta = {"role": "assistant", **reply} | ({"tool_calls": calls} if calls else {})
            chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            ends = "tool_calls" if calls else "stop"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for change, reason in ((delta, None), ({}, ends)):
                choice = {"index": 0, "delta": change, "finish_reason": reason}
                self.wfile.write(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", told
    finally:
        server.shutdown()
        server.server_close()


class Runtime(SubprocessRuntime):
    """Runs verifiers' chat program in this process: no uv and no downloads."""

    async def prepare_uv_script(self, script, env=None, *, activate=True):
        self.program = script
        return ["chat"]

    async def run(self, argv, env):
        if argv[0] != "chat":
            return await super().run(argv, env)
        program = {"__name__": "chat"}
        exec(self.program, program)
        with mock.patch.object(sys, "argv", argv), contextlib.chdir(self.workdir):
            try:
                await program["main"]()
            except Exception as error:  # the program's end where a stop refuses it a turn
                return ProgramResult(exit_code=1, stdout="", stderr=repr(error))
        return ProgramResult(exit_code=0, stdout="", stderr="")


def roll_out(env_id, example, replies):
    """(the trace, the bodies of the model's requests) of one episode of an environment's task."""
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    env = vf.load_environment(vf.resolve_env_config({"taskset": {"id": env_id}, "agent": agent}))
    (task,) = [task for task in env.taskset if task.data.idx == example["idx"]]

    async def run(url):
        client = vf.EvalClientConfig(base_url=url, api_key_var="NONE")
        async with env.serving():
            return await env.run_episode(task, vf.ModelContext(model="m", client=client))

    patch = mock.patch.object(verifiers.v1.rollout, "make_runtime", Runtime)
    with scripted_model(replies) as (url, told), patch:
        episode = asyncio.run(run(url))
    assert episode.ok, episode.errors or episode.traces[0].errors
    (trace,) = episode.traces
    return trace, told
