"""A scripted user who asks for words, one turn each; for the tests of the adapter to verifiers."""

import verifiers.v1 as vf

__all__ = ["EchoesEnv", "EchoesTaskset"]


class EchoesData(vf.TaskData):
    words: list[str]


class EchoesTask(vf.Task[EchoesData]):
    async def setup(self, trace: vf.Trace) -> None:
        trace.info["limit"] = 3

    @vf.stop
    def full(self, trace: vf.Trace) -> bool:
        return trace.num_turns >= trace.info["limit"]

    @vf.stop(priority=1)
    async def rude(self, trace: vf.Trace) -> bool:
        return "shut up" in trace.last_reply

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return trace.num_turns

    @vf.reward(weight=2.0)
    async def echoed(self, trace: vf.Trace) -> float:
        said = [message.content for message in trace.assistant_messages]
        return sum(word in text for word, text in zip(self.data.words, said)) / len(self.data.words)

    @vf.reward
    async def thoughts(self, trace: vf.Trace) -> dict[str, float]:
        return {"thought": sum(bool(m.reasoning_content) for m in trace.assistant_messages)}


class EchoesEnv(vf.SingleAgentEnv):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()
            for word in task.data.words[1:]:
                if segment.terminated:
                    break
                text = f"You said {segment.last_reply!r}. Now say {word}."
                segment = await interaction.turn([{"role": "user", "content": text}])
        interaction.trace.record_reward("length", len(interaction.trace.transcript), 1e-3)

    async def finalize(self, task, episode):
        (trace,) = episode.traces
        trace.record_reward("ended", {"full": 10, "rude": 20}.get(trace.stop_condition, 30))


class EchoesTaskset(vf.Taskset[EchoesTask, vf.TasksetConfig]):
    def load(self):
        for words in (["red"], ["red", "green"], ["red", "green", "blue", "pink"]):
            yield EchoesTask(
                EchoesData(
                    words=words,
                    system_prompt="Be brief.",
                    prompt=f"Say {words[0]}.",
                ),
                self.config.task,
            )
