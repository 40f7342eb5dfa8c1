"""The peers as they are measured: the same prompts, greedy, timed from inside."""

import time
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

try:
    import xllamacpp
except ImportError:
    xllamacpp = None


class Transformers:
    """transformers on torch, `generate` as a user calls it, from a Hugging Face folder.

    Not from the GGUF file: there it keeps the weights packed, and its own packed kernels are slower.
    """

    def __init__(self, folder: Path, dtype: str):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = model.eval()

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """(prefill seconds, decode seconds of new - 1 steps) for prompts of one length."""
        started = time.perf_counter()
        self._generate(prompts, 1)
        prefill = time.perf_counter() - started
        if new == 1:
            return prefill, 0.0
        started = time.perf_counter()
        self._generate(prompts, new)
        return prefill, time.perf_counter() - started - prefill

    def _generate(self, prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )


class LlamaCpp:
    """llama.cpp through xllamacpp's server, with the file's weights at a dtype."""

    def __init__(self, gguf_path: Path, dtype: str, folder: Path):
        path = folder / f"{dtype}.gguf"
        write_as(gguf_path, path, dtype)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_predict = 4096, 1, 64
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.cache_prompt = False
        self._server = xllamacpp.Server(params)

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """(prefill seconds, decode seconds of new - 1 steps) for one prompt."""
        (prompt,) = prompts
        out = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = out["timings"]
        steps = (new - 1) / max(timings["predicted_n"], 1)
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3 * steps

    def logprobs(self, prompt: list[int], count: int) -> list[dict]:
        """The `count` most probable next tokens: {"id", "logprob"}."""
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": count, "temperature": 0}
        out = self._server.handle_completions(asked | {"cache_prompt": True})
        return out["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


def write_as(source: Path, target: Path, dtype: str) -> None:
    """Copies a GGUF file with its matrices dequantised to a dtype."""
    kinds = {
        "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }
    kind, file_type = kinds[dtype]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value, types = field.contents(), field.types
        if field.name == "general.file_type":
            value = int(file_type)
        sub_type = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        matrix = kind if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(data), matrix)
        writer.add_tensor(tensor.name, data, raw_dtype=matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
