"""GGUF files broken anywhere: every truncation, every bit of the header, random structures.

What is accepted must be what the gguf package's reader finds; all else is one typed error.
"""

import os
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.llama.formats.gguf import GGUFFile, open_gguf, to_config
from tests.tiny_gguf import ARRAY, STRING, U32, array, build, info, pair, small_file, string
from utils.errors import ArtifactError, ConfigError

HUGE = (2**64 - 1, 2**63, 2**63 - 1, 2**32, 10**9)
GOOD = small_file()


@pytest.mark.covers("A26", "A27", "A28", "A30")
def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(GOOD)
    for size in reversed(range(len(GOOD))):
        os.truncate(path, size)
        with pytest.raises(ArtifactError):
            open_gguf(path)


def refused_or_as_the_package_reads_it(path: Path, data: bytes, compare: bool = True) -> bool:
    """Whether the file is accepted. What is accepted has bounded counts, so that the package's
    reader, which knows no bounds, can say whether it was understood."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)  # no O_TRUNC: it takes longer than all the rest
    os.ftruncate(fd, os.pwrite(fd, data, 0))
    os.close(fd)
    try:
        file = open_gguf(path)
    except ArtifactError as e:
        assert "\n" not in str(e)
        return False
    for name, shape in file.shapes.items():
        value = file.read(name)
        assert value.shape == shape and value.dtype == file.dtypes[name]
    try:
        to_config(file)
    except ConfigError as e:
        assert "\n" not in str(e)
    if compare:
        assert_read_like_the_package(file, path)
    return True


def assert_read_like_the_package(file: GGUFFile, path: Path) -> None:
    theirs = gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    # An empty array's contents are given as what comes first in it: nothing of it is compared.
    assert repr({k: v for k, v in file.metadata.items() if v != []}) == repr(
        {k: v for k, v in fields.items() if file.metadata[k] != []}
    )
    assert file.shapes == {t.name: tuple(t.shape.tolist()[::-1]) for t in theirs.tensors}


@pytest.mark.slow
@pytest.mark.covers("A26", "A27", "A28", "A29", "A30", "A32")
def test_every_flipped_bit_of_the_header(tmp_path):
    path, accepted = tmp_path / "flipped.gguf", 0
    end = GOOD.index(string("q4")) + 42
    for bit in range(8 * end):
        data = bytearray(GOOD)
        data[bit // 8] ^= 1 << bit % 8
        compare = bit % 8 == bit // 8 % 8  # one bit of each byte: the package's reader is slow
        accepted += refused_or_as_the_package_reads_it(path, bytes(data), compare)
    assert 0 < accepted < 8 * end


INTS = st.sampled_from([0, 1, 2, 3, 4, 8, 31, 32, 33, 64, 255, 2**31, 2**32, *HUGE, 2**64 - 32])
NAMES = st.sampled_from(["a", "b", "é", "", "general.alignment", "llama.block_count", "k" * 300])
SCALARS = st.sampled_from(range(14)).flatmap(lambda k: st.tuples(st.just(k), st.binary(max_size=9)))
ARRAYS = st.builds(array, st.sampled_from([*range(14), 99]), st.binary(max_size=20), INTS)
PAIRS = st.one_of(
    st.builds(lambda name, scalar: pair(name, *scalar), NAMES, SCALARS),
    st.builds(lambda name, payload: pair(name, ARRAY, payload), NAMES, ARRAYS),
    st.builds(lambda name, value: pair(name, U32, value), NAMES, st.integers(0, 2**32 - 1)),
    st.builds(lambda name, value: pair(name, STRING, value), NAMES, st.text(max_size=8)),
)
KINDS = st.sampled_from([*map(int, Kind), 4, 99])
INFOS = st.builds(info, NAMES, st.lists(INTS, max_size=5).map(tuple), KINDS, INTS)
PLAIN = st.builds(info, st.sampled_from("tuv"), st.just((2,)), st.just(Kind.F32), INTS)


@pytest.mark.covers("A26", "A27", "A28", "A29", "A30")
@settings(
    max_examples=600,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pairs=st.lists(PAIRS, max_size=3),
    infos=st.lists(INFOS | PLAIN, max_size=3),
    data=st.binary(max_size=100),
    lies=st.none() | st.tuples(INTS, INTS),
    alignment=st.sampled_from([8, 32, 64]),
)
def test_random_structures(tmp_path, pairs, infos, data, lies, alignment):
    counts = dict(zip(("n_pairs", "n_tensors"), lies)) if lies else {}
    file = build(pairs, infos, data, alignment=alignment, **counts)
    refused_or_as_the_package_reads_it(tmp_path / "random.gguf", file)
