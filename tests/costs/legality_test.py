"""Operations of a model as its sampler calls it, and the choices that a device rules out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpqdiff import models, sites, weights
from mpqdiff.costs import legality
from mpqdiff.costs.legality import RULES, Convolution, Einsum, Operation, Rules, legal, restrict
from mpqdiff.denoiser import Prediction, from_linen
from mpqdiff.errors import InputError
from mpqdiff.kernels.quantized_matmul import MAX_CONTRACTION
from mpqdiff.quantize import operate
from mpqdiff.records import FLOAT_BITS

FLOAT = (FLOAT_BITS, FLOAT_BITS)
BATCH = 3
TINY = dict(image_size=8, channels=1, patch=4, width=16, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(scope="module")
def tiny():
    """(denoise, parameter shapes, all its sites, shapes of a batch)."""
    module = models.build("dit", **TINY)
    params = jax.eval_shape(lambda key: weights.initialise(module, key), jax.random.key(0))
    denoise = from_linen(module)
    found, _ = sites.list_sites(denoise, params, *sites.example_inputs((8, 8, 1)))
    return denoise, params, found, sites.example_inputs((8, 8, 1), batch=BATCH)


def test_operations_have_the_rows_of_the_batched_call(tiny):
    denoise, params, found, inputs = tiny
    planned = sites.planned(found, products=True)
    flags = ["fc2" in site.path or site.kind == "product" for site in planned]
    operations = legality.operations(denoise, params, planned, *inputs, asymmetric=flags)
    assert list(operations) == [site.path for site in planned]
    # t has shape []: its embedding is one row whatever the batch; adaLN also sees the label.
    assert operations["t_embed/fc1"] == Operation("dense", 1, 256, 16, True)
    assert operations["block_0/adaln"] == Operation("dense", BATCH, 16, 96, True)
    assert operations["block_0/mlp/fc1"] == Operation("dense", BATCH * 4, 16, 64, True)
    assert operations["block_1/mlp/fc2"] == Operation("dense", BATCH * 4, 64, 16, True, True)
    assert operations["block_0/attn/pv"] == Operation(
        "product",
        BATCH * 2 * 4,
        4,
        8,
        geometry=Einsum("bhpq,bqhd->bphd", (BATCH, 2, 4, 4), (BATCH, 4, 2, 8)),
    )
    conv = operations["patch_embed"]
    assert (conv.kind, conv.rows, conv.contraction, conv.outputs) == ("conv", BATCH * 4, 16, 16)
    assert conv.geometry == Convolution((BATCH, 8, 8, 1), (4, 4), (4, 4), "VALID", 1, 1, 1)
    # Equal blocks share their operations, and `final` has the shape of `proj`: one timing each.
    assert operations["block_0/attn/qkv"] == operations["block_1/attn/qkv"]
    assert len(set(operations.values())) == 11
    for site in planned:
        one = operations[site.path]
        images = 1 if site.path.startswith("t_embed") else BATCH
        assert one.rows * one.contraction * one.outputs == images * site.macs


def test_online_scales_have_no_zero_point(tiny):
    denoise, params, found, inputs = tiny
    planned = sites.planned(found)
    operations = legality.operations(
        denoise, params, planned, *inputs, asymmetric=[True] * len(planned), online=True
    )
    assert all(one.online and not one.asymmetric for one in operations.values())


def test_sites_without_a_product_are_refused(tiny):
    denoise, params, found, inputs = tiny
    with pytest.raises(InputError, match=r"'label_embed'.*leave embeddings out"):
        legality.operations(denoise, params, found, *inputs)
    gone = sites.Site("block_9/fc", "dense", (4, 4), 16, 0, 16, "block_9/fc")
    with pytest.raises(InputError, match="block_9/fc"):
        legality.operations(denoise, params, [gone], *inputs)


def test_executions_follow_the_packed_width():
    dense = Operation("dense", 4, 8, 8)
    names = [legality.execution(dense, w, 8) for w in range(2, 9)]
    assert names == ["int2", "int4", "int4", "int8", "int8", "int8", "int8"]
    assert legality.execution(dense, 4, 2) == "int4"  # the activation's width changes nothing
    assert legality.execution(dense, *FLOAT) == "float32"
    product = Operation("product", 4, 8, 8, geometry=Einsum("ab,bc->ac", (4, 8), (8, 8)))
    assert {legality.execution(product, w, 8) for w in range(2, 9)} == {"int8"}
    assert legality.executions(product) == ("float32", "bf16", "int8")
    assert legality.executions(dense) == ("float32", "bf16", "int8", "int4", "int2")


CONVS = {
    "plain": dict(padding="SAME"),
    "pairs": dict(padding=((1, 0), (2, 1)), strides=2),
    "grouped": dict(feature_group_count=2),
    "dilated": dict(kernel_dilation=(2, 1)),
    "transposed": dict(input_dilation=2, padding=((1, 1), (1, 1))),
    "circular": dict(padding="CIRCULAR"),
}


@pytest.mark.parametrize("name", CONVS)
def test_what_has_no_integer_form_is_what_the_integer_model_refuses(name):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), **CONVS[name], name="conv")(x)

    def denoise(params, x_t, t, cond):
        return Prediction(jnp.asarray(Model().apply({"params": params}, x_t)))

    x = jnp.zeros((2, 8, 8, 2))
    params = Model().init(jax.random.key(0), x)["params"]
    site = sites.Site("conv", "conv", (3, 3, 2, 4), 72, 4, 72, "conv")
    found = legality.operations(denoise, params, [site], x, 0, None)["conv"]
    conv = nn.Conv(4, (3, 3), **CONVS[name])
    try:
        operate.geometry(conv.bind({}))
    except InputError:
        assert legality.float_only(found)
        assert legality.executions(found) == legality.FLOATS
        mask, reasons = legal({"conv": found}, [(8, 8), FLOAT], RULES["cpu"])
        assert mask.tolist() == [[False, True]]
        assert reasons[0][:2] == ("conv", (8, 8)) and "no integer form" in reasons[0][2]
    else:
        assert legality.float_only(found) is None
        assert legal({"conv": found}, [(8, 8), FLOAT], RULES["cpu"])[0].all()


def test_a_sum_that_can_overflow_stays_in_float():
    long = Operation("dense", 4, MAX_CONTRACTION + 1, 8)
    assert "can overflow int32" in str(legality.float_only(long))
    assert legality.float_only(Operation("dense", 4, MAX_CONTRACTION, 8)) is None


def test_the_gpu_asks_for_rows_and_alignment():
    operations = {
        "one_row": Operation("dense", 1, 256, 96),
        "sixteen": Operation("dense", 16, 256, 96),
        "fine": Operation("dense", 17, 256, 96),
        "inputs": Operation("dense", 64, 12, 96),
        "outputs": Operation("dense", 64, 16, 4),
    }
    choices = [(4, 8), (8, 8), FLOAT]
    assert legal(operations, choices, RULES["cpu"])[0].all()
    mask, reasons = legal(operations, choices, RULES["gpu"])
    np.testing.assert_array_equal(mask[:, 2], True)
    np.testing.assert_array_equal(mask[:, 0], [False, False, True, False, False])
    np.testing.assert_array_equal(mask[:, 0], mask[:, 1])
    told = {path: reason for path, _, reason in reasons}
    assert told["one_row"] == "1 rows, integer products have at least 17 here"
    assert told["inputs"] == "contraction of 12, integer products need multiples of 8 here"
    assert told["outputs"] == "outputs of 4, integer products need multiples of 8 here"
    assert len(reasons) == 8


def test_odd_widths_go_only_where_their_room_can_be_filled():
    operations = {"a": Operation("dense", 4, 8, 8)}
    rules = Rules(odd_widths=False)
    choices = [(3, 8), (4, 4), (4, 8), (5, 8), (6, 4), (8, 8), FLOAT]
    mask, reasons = legal(operations, choices, rules)
    # (6, 4) stays: no 8 bits with 4-bit activations are offered.
    assert mask[0].tolist() == [False, True, True, False, True, True, True]
    assert [(choice, why) for _, choice, why in reasons] == [
        ((3, 8), "3 bits take the room of 4 on the device, and 4 is offered"),
        ((5, 8), "5 bits take the room of 8 on the device, and 8 is offered"),
    ]
    assert legal(operations, choices, Rules())[0].all()


def test_restrict_keeps_pins_and_reports_what_it_took():
    operations = {"one": Operation("dense", 1, 256, 96), "many": Operation("dense", 64, 256, 96)}
    choices = [(4, 8), (8, 8), FLOAT]
    pinned = np.array([[True, True, True], [False, True, False]])
    mask, ruled_out = restrict(operations, choices, pinned, "gpu")
    assert mask.tolist() == [[False, False, True], [False, True, False]]
    reason = "1 rows, integer products have at least 17 here"
    assert ruled_out == [
        {"site": "one", "choice": [w, 8], "reason": reason} for w in (4, 8)
    ]  # fmt: skip
    same, none = restrict(operations, choices, pinned, "cpu")
    assert same.tolist() == pinned.tolist() and none == []
    without = restrict(operations, [(3, 8), (4, 8)], np.ones((2, 2)), "cpu", odd_widths=False)[0]
    assert without.tolist() == [[False, True]] * 2


def test_a_site_without_a_choice_is_named_with_its_reason():
    operations = {"fine": Operation("dense", 64, 8, 8), "one": Operation("dense", 1, 8, 8)}
    with pytest.raises(InputError, match=r"'one'.*1 rows.*plan.keep_float=True"):
        restrict(operations, [(8, 8)], np.ones((2, 1), bool), "gpu")
    pinned = np.array([[True, True], [True, False]])
    with pytest.raises(InputError, match=r"'one'.*a pin at 32.*no pin on it"):
        restrict(operations, [(8, 8), FLOAT], pinned, "gpu")
    with pytest.raises(InputError, match="'npu'; known: cpu, gpu, tpu"):
        restrict(operations, [(8, 8)], np.ones((2, 1), bool), "npu")
