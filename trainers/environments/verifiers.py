"""An adapter to environments of the package `verifiers` (0.4), in this process and without servers.

Verifiers has an agent's program talk to a model and to tools over HTTP. Here the agent is the model
in training: its turns come from `step`, and tools are called directly. The environment, its tasks'
hooks, stops, tools and rewards are verifiers' own, and read its `Trace`.
"""

import asyncio
import contextlib
import inspect
import itertools
import json
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from trainers.environments import Answer, Environment, Example, Message
from trainers.environments.games import deal
from utils.errors import ConfigError, raise_all, reason


def import_verifiers() -> tuple[Any, Any]:
    """(verifiers.v1, the server of tools that it uses), which are optional and slow to import.

    Raises ConfigError if they are missing.
    """
    try:
        import verifiers.v1
        import verifiers.v1.harnesses.utils.compaction
        import verifiers.v1.harnesses.utils.mcp
        from mcp.server.mcpserver import MCPServer
    except ImportError as error:
        text = f"verifiers cannot be imported: {reason(error)}; pip install 'altiplano[verifiers]'"
        raise ConfigError(text) from error
    return verifiers.v1, MCPServer


class Verifiers(Environment):
    """An environment of verifiers with one agent. The reward is that of its trace.

    Not supported: several agents, or conversations, per episode; containers, sandboxes, and hooks
    that run programs in one; tools that run elsewhere; interceptors, and stops that read requests or
    responses; images; environments for versions before 0.4. Verifiers does not score an episode that
    ends at a limit of the run.
    """

    answers_calls = True

    def __init__(self, env_id: str, config: Mapping[str, Any] | None = None):
        """Loads the environment.

        Args:
            env_id: the name of an installed package with a taskset.
            config: verifiers' EnvConfig, for example {"taskset": {"split": "train"}}.

        Raises:
            ConfigError: a package is missing, the config is wrong, or something is not supported.
        """
        (self._vf, self._server), config = import_verifiers(), dict(config or {})
        config["taskset"] = {**config.get("taskset", {}), "id": env_id}
        try:
            self._env = self._vf.load_environment(self._vf.resolve_env_config(config))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"verifiers: {env_id!r} cannot be loaded: {reason(error)}") from error
        taskset, self._end = self._env.taskset, None
        self._task_type = taskset.task_type()
        self._shared = taskset.toolsets(taskset.config)
        toolsets = [*self._shared, *self._task_type.toolsets(taskset.config.task)]
        agents = [key for key, value in self._env.config if isinstance(value, self._vf.AgentConfig)]
        problems = [f"it has the agents {', '.join(agents)}, expected one"] * (len(agents) > 1)
        problems += ["its tasks need a container"] * self._task_type.NEEDS_CONTAINER
        for tools in toolsets:
            local = isinstance(tools.config.runtime, self._vf.SubprocessConfig)
            if getattr(tools.config, "url", None) or not local:
                problems.append(f"its {type(tools).__name__} runs elsewhere")
        raise_all(f"verifiers: {env_id!r} is not supported", problems)
        self.tools = asyncio.run(self._prepare(toolsets))

    async def _prepare(self, toolsets: Sequence[Any]) -> list[dict[str, Any]]:
        """Sets up the tools that all episodes share. Returns the schemas of all tools."""
        for tools in self._shared:
            await tools.setup()
        served = await self._serve(toolsets, None)
        told = [(k, tool.description or "", tool.input_schema) for k, (_, tool) in served.items()]
        keys = ("name", "description", "parameters")
        return [{"type": "function", "function": dict(zip(keys, values))} for values in told]

    async def _serve(self, toolsets: Sequence[Any], state: Any) -> dict[str, tuple[Any, Any]]:
        """(server, tool) by the names that a model knows, for an episode's state."""

        async def pull() -> Any:
            return state

        async def push(before: bytes) -> None:
            pass  # the call has changed the state itself

        found = {}
        for tools in toolsets:
            tools._pull_state, tools._push_state = pull, push
            server = self._server(tools.server_name or type(tools).__name__)
            tools.register(server)
            prefix = tools.server_name and f"{tools.server_name}_"
            found |= {f"{prefix}{tool.name}": (server, tool) for tool in await server.list_tools()}
        return found

    def examples(self, size: int, seed: int) -> Sequence[Example]:
        taskset = self._env.taskset
        tasks = taskset if taskset.bounded else itertools.islice(taskset, size)
        rows = [task.data.model_dump(mode="json", exclude_defaults=True) for task in tasks]
        return deal(rows, size, seed)

    def reset(self, example: Example) -> Sequence[Message]:
        if self._end:
            self._end()
        data = self._task_type.data_type().model_validate(example)
        self._runner = asyncio.Runner()
        self._end = weakref.finalize(self, self._runner.close)  # at the next one, or at exit
        task = self._task_type(data, self._env.taskset.config.task)
        self._episode = self._runner.get_loop().create_task(self._play(task))
        messages = self._advance()
        if messages is None:
            raise ConfigError(
                "verifiers: the episode ended before the model was asked for anything"
            )
        return messages

    def step(self, message: Message) -> Answer:
        self._reply.set_result(message)
        messages = self._advance()
        return ([], self._reward, True) if messages is None else (messages, None, False)

    def _advance(self) -> list[Message] | None:
        """Runs the episode until it asks the model. Returns the messages before; None: it is over."""
        loop = self._runner.get_loop()
        self._asked, self._reply = loop.create_future(), loop.create_future()
        either = asyncio.wait([self._asked, self._episode], return_when=asyncio.FIRST_COMPLETED)
        loop.run_until_complete(either)
        if self._asked.done():
            return self._asked.result()
        self._reward = self._episode.result()
        return None

    async def _play(self, task: Any) -> float:
        """Verifiers' `Env.run_episode`, with the model as the agent. Returns the reward."""
        env, self._seat = self._env, (seat := _Seat(self))
        agents = self._vf.Agents(env.config, seat.take)
        await env.start()
        try:
            await env.setup(agents)
            await env.run(task, agents)
            if seat.trace is not None:
                episode = self._vf.Episode(task=seat.trace.task, traces=[seat.trace])
                await env.finalize(task, episode)
        finally:
            await env.stop()
        return seat.trace and seat.trace.reward

    async def _ask(self, messages: Sequence[Any]) -> Any:
        """The model's answer, with its thoughts apart."""
        self._asked.set_result([message.model_dump(exclude_none=True) for message in messages])
        message = await self._reply
        thoughts, ended, content = (message.get("content") or "").rpartition("</think>")
        calls = [(call["id"], call["function"]) for call in message.get("tool_calls") or []]
        return self._vf.AssistantMessage(
            content=content.strip() if ended else content,
            reasoning_content=thoughts.strip().removeprefix("<think>").strip() or None,
            tool_calls=[
                self._vf.ToolCall(id=i, name=call["name"], arguments=json.dumps(call["arguments"]))
                for i, call in calls
            ]
            or None,
        )


class _Seat:
    """Stands in for verifiers' Agent and for its Interaction: one conversation with the model."""

    trainable = True

    def __init__(self, environment: Verifiers):
        self._of, self._vf, self.trace = environment, environment._vf, None

    def take(self, name: str, config: Any) -> "_Seat":
        """The agent of a name, with verifiers' AgentConfig."""
        self.name, self.config = name, config
        return self

    async def run(self, task: Any, **borrowed: Any) -> Any:
        """The trace of a single segment."""
        async with self.interaction(task, **borrowed):
            await self.turn()
            self.trace.stop("agent_completed")
        return self.trace

    @contextlib.asynccontextmanager
    async def interaction(self, task: Any, **borrowed: Any) -> AsyncIterator["_Seat"]:
        """A conversation with the setup of its task before, and its rewards after."""
        vf = self._vf
        self._refuse(task, borrowed)
        self.trace = trace = vf.Trace(
            task=vf.TraceTask(
                type=type(task).__name__, data=task.data, key=task.key, hash=task.hash
            ),
            agent=vf.AgentInfo(config=self.config, name=self.name),
            state=vf.state.state_cls(type(task))(),
        )
        await vf.utils.decorators.invoke(task.setup, {"trace": trace, "runtime": None})
        self._task, self._tools = task, None
        trace.tools = [vf.Tool(**schema["function"]) for schema in self._of.tools]
        self._stops = task.hooks("stop")
        system = task.data.system_prompt
        self._next = [vf.SystemMessage(content=system)] if system is not None else []
        self._next += self._typed(task.data.prompt)
        yield self
        trace.stop("user_closed")
        await vf.utils.decorators.invoke(task.finalize, {"trace": trace, "runtime": None})
        await task.score(trace)
        trace.is_completed = trace.ok = True

    def _refuse(self, task: Any, borrowed: Mapping[str, Any]) -> None:
        """Raises ConfigError that lists what the task needs and is not supported."""
        vf, problems = self._vf, []
        if self.trace is not None or any(borrowed.values()):
            problems.append("it has several conversations per episode, or lends a runtime or tools")
        if vf.utils.decorators.discover_decorated(task, "intercept"):
            problems.append("it intercepts messages")
        for stop in task.hooks("stop"):
            if vf.session.hook_boundary(stop, allow_trace=True) is not vf.Trace:
                problems.append(f"its stop {stop.__name__} reads no trace")
        hooks = [task.setup, task.finalize, *task.hooks("metric"), *task.hooks("reward")]
        for hook in hooks:
            ours = getattr(hook, "__func__", None) in (vf.Task.setup, vf.Task.finalize)
            if not ours and "runtime" in inspect.signature(hook).parameters:
                problems.append(f"its {hook.__name__} runs programs in a runtime")
        if task.data.image is not None:
            problems.append("it runs in a container")
        raise_all(f"verifiers: {type(task).__name__} is not supported", problems)

    async def turn(self, message: Any = None) -> Any:
        """One segment: the model's turns up to one that calls no tool."""
        trace, vf = self.trace, self._vf
        if trace.stop_condition is not None:
            return vf.Segment(messages=[], terminated=True)
        new, self._next = [*self._next, *self._typed(message)], []
        start = len(trace.nodes) + len(new)
        while new and not await self._is_stopped():
            reply = await self._of._ask(new)
            for told in (*new, reply):
                parent = len(trace.nodes) - 1 if trace.nodes else None
                node = vf.MessageNode(parent=parent, message=told, sampled=told is reply)
                trace.nodes.append(node)
            new = [await self._call(call) for call in reply.tool_calls or []]
        said = [node.message for node in trace.nodes[start:]]
        return vf.Segment(messages=said, terminated=not said)

    def _typed(self, messages: Any) -> list[Any]:
        if isinstance(messages, str):
            return [self._vf.UserMessage(content=messages)]
        parse = self._vf.dialects.parse_message
        return [parse(m) if isinstance(m, dict) else m for m in messages or []]

    async def _is_stopped(self) -> bool:
        """Asks the limit of turns and the task's stops, as verifiers does before a model's turn."""
        limit = self.config.max_turns
        if limit is not None and self.trace.num_turns >= limit:
            self.trace.stop("max_turns")
            return True
        for stop in self._stops:
            if await self._vf.session.call_hook(stop, {self._vf.Trace: self.trace}):
                self.trace.stop(stop.__name__)
                return True
        return False

    async def _call(self, call: Any) -> Any:
        """The result of a tool, as verifiers' own chat program tells it."""
        utils, task = self._vf.harnesses.utils, self._task
        if self._tools is None:  # not before: a run reads the prompts of thousands of tasks
            own = task.toolsets(task.config)
            for tools in own:
                await tools.setup()
                await tools.setup_task(task.data)
            self._tools = await self._of._serve([*self._of._shared, *own], self.trace.state)
        server, tool = self._tools.get(call.name, (None, None))
        if server is None:
            content = f"error: unknown tool {call.name!r}"
        else:
            try:
                result = await server.call_tool(tool.name, json.loads(call.arguments))
                content = utils.mcp.mcp_content_to_chat_content(result.content)
            except Exception as error:  # which the server would answer
                content = str(error)
        if isinstance(content, str):
            content = utils.compaction.truncate_tool_output(content)
        return self._vf.ToolMessage(tool_call_id=call.id, name=call.name, content=content)
