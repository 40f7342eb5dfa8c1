"""The table of sharding rules: a parameter matches one row, and each broken table says what is wrong."""

import dataclasses
import re

import jax
import pytest
from jax.sharding import AxisType

from models.llama.layout import PARAM_AXES, decoding_axes, param_axes
from models.llama.lora import LoRAConfig, adapter_axes, init_lora
from models.llama.model import init_params
from models.llama.presets import PRESETS
from tests.small_runs import MODEL
from utils.errors import ConfigError
from utils.sharding import DECODING, MESH_AXES, TRAINING, ShardingRules
from utils.sharding import check_tokens, current_mesh, default_mesh, make_mesh, param_specs

P = jax.sharding.PartitionSpec
BIASED = dataclasses.replace(MODEL, attention_bias=True, mlp_bias=True, tie_embeddings=False)
QWEN3 = dataclasses.replace(BIASED, mlp_bias=False, family="qwen3")


class Sizes:
    """A mesh is asked for its sizes alone."""

    def __init__(self, **shape):
        self.shape = dict.fromkeys(MESH_AXES, 1) | shape


def shapes_of(config):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def flat(tree):
    is_spec = lambda x: isinstance(x, P)
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]
    }


@pytest.mark.parametrize("name", ["llama-2-7b", "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_every_parameter_matches_one_row_and_every_row_a_parameter(name):
    config = PRESETS[name]
    specs = param_specs(shapes_of(config), param_axes(config), TRAINING, Sizes())
    assert flat(specs).keys() == flat(shapes_of(config)).keys()


def test_the_whole_table_is_used():
    assert param_axes(BIASED) | param_axes(QWEN3) == PARAM_AXES
    lora = LoRAConfig(rank=2)
    tree = jax.eval_shape(lambda: init_lora(MODEL, lora, jax.random.key(0)))
    specs = flat(param_specs(tree, adapter_axes(lora), TRAINING, Sizes()))
    assert specs["layers/attn/wo_a"] == P(None, None, ("tensor",))
    assert specs["layers/attn/wo_b"] == P(None, ("fsdp", "context"), None)


def test_what_lies_where():
    shapes, axes = shapes_of(BIASED), param_axes(BIASED)
    specs = flat(param_specs(shapes, axes, TRAINING, Sizes(fsdp=2, tensor=2)))
    assert specs["embed"] == P(("tensor",), ("fsdp", "context"))
    assert specs["layers/attn/wk"] == P(None, ("tensor",), ("fsdp", "context"))
    assert specs["layers/mlp/w_down"] == P(None, ("fsdp", "context"), ("tensor",))
    assert specs["layers/attn/bq"] == P(None, ("tensor",))
    assert specs["layers/ffn_norm"] == P(None, None)
    layer = {"layers": {"7": {"attn": {"wq": jax.ShapeDtypeStruct((16, 8), "float32")}}}}
    table = decoding_axes(PARAM_AXES)
    specs = param_specs(layer, table, DECODING, Sizes(fsdp=2, tensor=2), all_rows=False)
    assert flat(specs)["layers/7/attn/wq"] == P(("tensor", "fsdp", "context"), None)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"layers/.*": (None,)}, r"embed \[8, 4\] matches no row of the table, expected one"),
        (
            {"e.*": ("vocab", "embed"), "embed": ("vocab", "embed")},
            r"embed \[8, 4\] matches rows \['e\.\*', 'embed'\] of the table, expected one",
        ),
        ({"embed": ("vocab", "embed"), "lm_head": (None,)}, "no parameter matches row 'lm_head'"),
        ({"embed": ("vocab",)}, r"embed has shape \[8, 4\], its row 'embed' axes \('vocab',\)"),
        (
            {"embed": ("vocab", "ffn")},
            r"embed \[8, 4\] has mesh axis 'tensor' twice: \('vocab', 'ffn'\)",
        ),
        (
            {"embed": ("embed", "vocab")},
            r"embed \[8, 4\]: embed has size 8, not a multiple of fsdp=3",
        ),
    ],
)
def test_each_broken_table_says_what_is_wrong(table, message):
    params = {"embed": jax.ShapeDtypeStruct((8, 4), "float32")}
    with pytest.raises(ConfigError, match=message):
        param_specs(params, table, TRAINING, Sizes(fsdp=3, tensor=2))


def test_all_that_is_wrong_is_said_at_once():
    params = {name: jax.ShapeDtypeStruct((6, 4), "float32") for name in ("a", "b")}
    with pytest.raises(ConfigError) as error:
        param_specs(params, {"b": ("vocab", "embed"), "c": ()}, TRAINING, Sizes(fsdp=8, tensor=4))
    for text in ("a [6, 4] matches no row", "vocab has size 6", "embed has size 4", "row 'c'"):
        assert text in str(error.value)


@pytest.mark.parametrize("axes", [("fsdp", "fsdp"), ("model",), "fsdp"])
def test_rules_name_the_mesh_axes_once(axes):
    with pytest.raises(ConfigError, match=r"ShardingRules: embed=.*expected a tuple of data, fsdp"):
        dataclasses.replace(TRAINING, embed=axes)
    assert isinstance(TRAINING, ShardingRules)


@dataclasses.dataclass(frozen=True)
class Device:
    """One of a kind whose grid JAX does not know, as a CPU's."""

    id: int
    device_kind = platform = "fake"
    process_index = 0


@pytest.mark.parametrize(
    "spec, devices, shape",
    [
        (None, 8, (1, 8, 1, 1)),
        ("data=2,fsdp=4", 8, (2, 4, 1, 1)),
        (" tensor = 2 , data=-1", 8, (4, 1, 1, 2)),
        ({"tensor": 8}, 8, (1, 1, 1, 8)),
    ],
)
def test_a_mesh_is_made_of_what_is_given(spec, devices, shape):
    mesh = make_mesh(spec, [Device(id=i) for i in range(devices)])
    assert (mesh.axis_names, mesh.devices.shape) == (MESH_AXES, shape)
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("fsdp=3", "--mesh data=1,fsdp=3,context=1,tensor=1 is for 3 devices, and there are 8"),
        ("data=3,fsdp=-1", "is for 3 devices or a multiple, and there are 8"),
        ("fsdp=2,fsdp=4", "expected for example data=2,fsdp=4,tensor=2"),
        ("fsdp", "expected for example data=2,fsdp=4,tensor=2"),
        ("model=8", "no axis 'model'; axes are data, fsdp, context, tensor"),
        ("data=-1,fsdp=-1", "expected sizes from 1, and -1 for one axis at most"),
        ("data=0", "expected sizes from 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_mesh(spec, ["device"] * 8)


def test_a_mesh_with_explicit_axes_is_refused_and_not_left_unused():
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ConfigError, match="AxisType.Auto"):
        current_mesh()


def test_a_row_that_is_cut_needs_tokens_and_heads_that_can_be_shared():
    cut = jax.sharding.AbstractMesh((1, 2, 4, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(cut):
        check_tokens(16, seq_len=64)
        with pytest.raises(ConfigError, match="seq_len=66 cannot be shared by context=4 .* of 4"):
            check_tokens(16, seq_len=66)
        with pytest.raises(
            ConfigError, match="n_heads=12 .* tensor=2 x context=4 devices; use a --mesh"
        ):
            check_tokens(12, seq_len=64)
    whole = jax.sharding.AbstractMesh((1, 2, 1, 8), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(whole):
        check_tokens(9, seq_len=7)


@pytest.mark.parametrize(
    "name, devices, fsdp",
    [
        ("llama-3.1-8b", 8, 8),
        ("llama-3.1-8b", 64, 32),  # 4096 / 64 numbers would be half a register
        ("llama-3.1-8b", 24, 8),
        ("llama-3.1-405b", 512, 128),
        ("smollm2-135m", 8, 4),
        ("llama-3.2-1b", 1, 1),
    ],
)
def test_the_default_mesh_leaves_each_device_a_register_of_the_model_dimension(name, devices, fsdp):
    assert default_mesh(PRESETS[name], devices) == {"data": devices // fsdp, "fsdp": fsdp}
