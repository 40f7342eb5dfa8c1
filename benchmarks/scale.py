"""Memory and speed limits of real steps, compiled for TPUs that need not be there: `python benchmarks/scale.py`.

Each line is a real step of this code, compiled ahead of time by `plan.py`, next to the goal;
google-tunix 0.1.7's figures are its compiled step of the same shape. No line is a measured speed.
`--docs` writes the tables of docs/scale.md anew instead.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "scale.md"
GIB = 2**30

SFT = "--job sft --remat block --param_dtype bfloat16 --state_dtype bfloat16"
ONE_B = f"--model llama-3.2-1b --topology v5e:2x2 {SFT}"
# Shape: tunix's temporaries as XLA reserves them, GiB per device.
TUNIX = {(4, 2048): 3.47, (4, 4096): 5.73, (8, 4096): 8.11}
MODELS = "llama-3.2-1b llama-3.1-8b llama-3.1-70b llama-3.1-405b".split()
MARKS = "<!-- tables: python benchmarks/scale.py --docs -->", "<!-- end of tables -->"


def plan(flags: str) -> dict:
    """plan.py's JSON."""
    command = [sys.executable, str(ROOT / "plan.py"), *flags.split(), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode > 1:
        raise SystemExit(f"plan.py {flags} failed")
    return json.loads(done.stdout)


def numbers() -> None:
    """Prints each goal and what was found."""
    print("| what | found | to reach |\n|---|---|---|")
    for (batch, seq), theirs in TUNIX.items():
        found = plan(f"{ONE_B} --exact --batch {batch} --seq {seq}")
        show = lambda *cells: print("|", " | ".join(cells), "|", flush=True)
        name = f"1B SFT, v5e:2x2, {batch} x {seq}"
        temp = found["reserved_bytes"] / GIB
        show(f"{name}: temporaries", f"{temp:.2f} GiB", f"{theirs / 2:.2f} GiB")
        show(f"{name}: compiled in", f"{found['compile_seconds']:.0f} s", "40 s")
        show(f"{name}: FLOPs", f"{found['flops'] / bound_flops(batch, seq):.2f} x", "1.05 x")
    for model, topology in (("llama-3.1-8b", "v5e:2x4"), ("llama-3.2-1b", "v5e:2x2")):
        flags = f"--model {model} --topology {topology} --job generate --batch 32 --seq 4096"
        decode = plan(f"{flags} --prompt_len 128")["programs"][-1]
        held = decode["parts"]["parameters"] + decode["parts"]["KV cache"]
        moved = f"{decode['bytes_accessed'] / held:.2f} x"
        show(f"{model} decode, {topology}: bytes moved", moved, "1.15 x")
    long_rows = "--mesh fsdp=4,context=8 --batch 4 --seq 32768"
    for flags, name in (
        (
            f"--model llama-3.1-8b --topology v5e:4x8 {SFT} {long_rows}",
            "8B SFT, v5e:4x8, 4 x 32768",
        ),
        (f"--model llama-3.1-405b --topology v5p:8x8x8 {SFT} --seq 4096", "405B SFT, v5p:8x8x8"),
        ("--model llama-3.1-70b --topology v5e:8x8 --job lora --remat block", "70B LoRA, v5e:8x8"),
    ):
        found = plan(flags)
        spare = f"{found['spare_bytes'] / GIB:.1f} GiB to spare"
        show(name, spare if found["fits"] else f"does not fit ({spare})", "fits")


def bound_flops(batch: int, seq: int, devices: int = 4) -> float:
    """One device's FLOPs: 6 per parameter and token, attention, and one more forward pass."""
    layers, head, dim, depth = 973_146_112, 262_668_288, 2048, 16
    tokens = batch * seq
    attention = 2 * tokens * seq * dim * depth  # half of all pairs, two products
    return ((8 * layers + 6 * head) * tokens + (1 + 1 + 2.5) * attention) / devices


def docs() -> None:
    """Writes the smallest slice that holds each job into docs/scale.md; takes about an hour."""
    lines = []
    for job in ("sft", "lora", "grpo"):
        lines += [f"\n### {job}\n", "| model | slice | mesh | rows | remat | a device | at least |"]
        lines.append("|---|---|---|---|---|---|---|")
        for model in MODELS:
            for kind in ("v5e", "v5p", "v6e"):
                lines.append(f"| {model} | {smallest(model, kind, job)} |")
                print(lines[-1], flush=True)
    text = DOCS.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    DOCS.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n\n{MARKS[1]}{after}")


def smallest(model: str, kind: str, job: str) -> str:
    """The cells of one row."""
    flags = f"--model {model} --topology {kind} --job {job} --search --seq 4096"
    command = [sys.executable, str(ROOT / "plan.py"), *flags.split(), "--json"]
    command += ["--param_dtype", "bfloat16", "--state_dtype", "bfloat16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        if "--search: no mesh" not in done.stderr:
            raise SystemExit(f"plan.py {flags} failed: {done.stderr}")
        return f"none of {kind} | | | | |"
    found = json.loads(done.stdout)
    mesh = ", ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1) or "one chip"
    seconds, price = found["roofline_seconds"], found["dollars_per_step"]
    shape = found["job"]
    at_once = shape["micro_batch_size"] and f", {shape['micro_batch_size']}"
    cells = found["topology"], mesh, f"{shape['batch']}{at_once or ''}", shape["remat"]
    return " | ".join(
        [*cells, f"{found['peak_bytes'] / GIB:.1f} GiB", f"{_two(seconds)} s, ${_two(price)}"]
    )


def _two(x: float) -> str:
    """A number with two digits: 0.00012, 1.5, 150."""
    rounded = float(f"{x:.2g}")
    return f"{rounded:.0f}" if rounded >= 10 else f"{rounded:.6f}".rstrip("0").rstrip(".")


def main() -> None:
    """Prints the goals, or writes the tables."""
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__))
    parser.add_argument("--docs", action="store_true")
    docs() if parser.parse_args().docs else numbers()


if __name__ == "__main__":
    main()
