"""Pool Skip on the patch grid of ViT and DeiT: right at every image size, in every form that timm users run."""

import copy
import io
import multiprocessing
import pickle
import threading
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models._features_fx import create_feature_extractor
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import CheckpointError

import poolskip_zoo  # noqa: F401  (registers the names)
from poolskip_zoo.layers.insert import add_pool_skip, pool_skip_modules, remove_pool_skip
from poolskip_zoo.layers.tokens import TokenPoolSkip2d, attach_grid
from poolskip_zoo.models.vit import PoolSkipVisionTransformer, PoolSkipVisionTransformerDistilled

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
# Height and width in pixels; the first three have 16 patches each.
SIZES = [(32, 32), (16, 64), (64, 16), (40, 24), (8, 56)]
CASES = {
    "square": ({}, [(32, 32)]),
    "not square": ({"img_size": (24, 40)}, [(24, 40)]),
    "any size": ({"dynamic_img_size": True}, SIZES),
    "padded": ({"dynamic_img_size": True, "dynamic_img_pad": True}, [(37, 50), (32, 32), (9, 7)]),
    "registers": ({"reg_tokens": 4, "dynamic_img_size": True}, SIZES[2:]),
    "no class token": ({"class_token": False, "global_pool": "avg", "dynamic_img_size": True}, SIZES[2:]),
    "no class token, one size": ({"class_token": False, "global_pool": "avg"}, [(32, 32)]),
    "norm before": ({"pre_norm": True, "embed_norm_layer": nn.LayerNorm, "init_values": 0.1}, [(32, 32)]),
    "distilled": ({"distilled": True}, [(32, 32)]),
    "distilled, any size": ({"distilled": True, "dynamic_img_size": True}, SIZES[2:]),
}


def make(distilled: bool = False, plain: bool = False, **kwargs) -> nn.Module:
    """A tiny model in eval mode, with strong Pool Skip, or its timm base."""
    torch.manual_seed(0)
    base = VisionTransformerDistilled if distilled else VisionTransformer
    ours = PoolSkipVisionTransformerDistilled if distilled else PoolSkipVisionTransformer
    model = (base if plain else ours)(**{**SMALL, **kwargs})
    # timm's layers start near zero, which would hide differences.
    for name, parameter in model.named_parameters():
        if "pool_skip" not in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny operators run faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(size[0] * 100 + size[1]))


def oracle(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same model from timm's own class, with hooks that know the grid and use torch's stock operators."""
    p = model.patch_embed.patch_size
    pad = model.patch_embed.dynamic_img_pad
    height, width = (-(-s // e) if pad else s // e for s, e in zip(x.shape[2:], p, strict=True))
    plain = remove_pool_skip(copy.deepcopy(model))
    prefix = plain.num_prefix_tokens
    for name, layer in pool_skip_modules(model).items():

        def hook(module, args, y, conv=layer.conv):
            patches = y[:, prefix:].transpose(1, 2).unflatten(2, (height, width)).contiguous()
            pooled, indices = F.max_pool2d(patches, 2, ceil_mode=True, return_indices=True)
            u = F.max_unpool2d(pooled, indices, 2, output_size=patches.shape[2:])
            patches = patches + conv(u)
            return torch.cat([y[:, :prefix], patches.flatten(2).transpose(1, 2)], 1)

        plain.get_submodule(name.removesuffix(".pool_skip")).register_forward_hook(hook)
    return plain(x)


@pytest.fixture(scope="module")
def dynamic():
    """A model of any image size, images, and what it must answer."""
    model = make(dynamic_img_size=True)
    images = [image(size) for size in SIZES]
    with torch.no_grad():
        return model, images, [oracle(model, x) for x in images]


def check(function, images, answers) -> None:
    with torch.no_grad():
        for x, answer in zip(images, answers, strict=True):
            torch.testing.assert_close(function(x), answer)


@pytest.mark.parametrize("case", CASES)
def test_equals_oracle_and_zero_init_equals_base(case):
    options, sizes = CASES[case]
    model, base = make(**options), make(plain=True, **options)
    zero = make(**options, pool_skip={"zero_init": True})
    assert not any(missing for missing in zero.load_state_dict(base.state_dict(), strict=False).unexpected_keys)
    with torch.no_grad():
        for size in sizes:
            x = image(size)
            torch.testing.assert_close(model(x), oracle(model, x))
            assert torch.equal(zero(x), base(x))
            assert not torch.allclose(model(x), remove_pool_skip(copy.deepcopy(model))(x), atol=1e-3)


def test_layer_leaves_prefix_tokens():
    model = make(reg_tokens=2)
    model(image((32, 32)))
    x = torch.randn(2, 3 + 16, 16)
    y = model.blocks[0].mlp.fc2.pool_skip(x)
    assert torch.equal(y[:, :3], x[:, :3])
    assert (y[:, 3:] != x[:, 3:]).any(2).all()


def test_in_place_and_back():
    model, x = make(plain=True, dynamic_img_size=True), image((40, 24))
    keys, modules = list(model.state_dict()), [(n, type(m)) for n, m in model.named_modules()]
    before = model(x)
    places = add_pool_skip(model, "blocks.*.mlp.fc2", pool_size=2, groups="depthwise")
    assert [(p.name, p.groups, p.parameters) for p in places] == [(f"blocks.{i}.mlp.fc2", 16, 160) for i in (0, 1)]
    new = [key for key in model.state_dict() if key not in keys]
    assert new == [f"blocks.{i}.mlp.fc2.pool_skip.conv.{n}" for i in (0, 1) for n in ("weight", "bias")]
    assert attach_grid(model) is attach_grid(model) is model.blocks[1].mlp.fc2.pool_skip.grid
    assert isinstance(model.patch_embed, PatchEmbed)
    torch.testing.assert_close(model(x), oracle(model, x))
    remove_pool_skip(model)
    assert list(model.state_dict()) == keys
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(model(x), before)
    add_pool_skip(model, zero_init=True)
    assert torch.equal(model(x), before)


def test_removed_after_another_patch_convolution_was_put_in():
    model = make()
    model.patch_embed.proj = nn.Conv2d(1, 16, 8, 8)
    x = image((32, 32))[:, :1]
    torch.testing.assert_close(model(x), oracle(model, x))
    remove_pool_skip(model)
    assert type(model.patch_embed) is PatchEmbed
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"distilled": True}], ids=str)
def test_set_input_size(options):
    model = make(**options)
    model(image((32, 32)))
    for change in ({"img_size": (24, 40)}, {"patch_size": (4, 8)}, {"img_size": (16, 32), "patch_size": 4}):
        model.set_input_size(**change)
        x = image(model.patch_embed.img_size)
        torch.testing.assert_close(model(x), oracle(model, x))
    with pytest.raises((TypeError, ValueError)):
        model.set_input_size(img_size="x")  # timm's own error, after which all is as before
    torch.testing.assert_close(model(x), oracle(model, x))
    remove_pool_skip(model)
    assert type(model.patch_embed) is PatchEmbed
    assert not model.patch_embed.proj._forward_hooks


def gradients(model, images, checkpointing, backward=torch.Tensor.backward):
    model.set_grad_checkpointing(checkpointing)
    model.zero_grad()
    backward(sum(model(x).square().sum() for x in images))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def backward_on_a_thread(loss):
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("backward", [torch.Tensor.backward, backward_on_a_thread])
def test_checkpointing_of_several_crops(backward):
    # Average pooling: the class token alone would leave the last block's Pool Skip without a gradient.
    model = make(dynamic_img_size=True, global_pool="avg").train()
    crops = [image(size) for size in SIZES[2:]]
    want = gradients(model, crops, False)
    got = gradients(model, crops, True, backward)
    assert all(g.abs().sum() > 0 for name, g in want.items() if "pool_skip" in name)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)


def test_checkpointing_of_equal_counts_never_silently_wrong():
    model = make(dynamic_img_size=True).train()
    with pytest.raises(CheckpointError):
        gradients(model, [image((16, 64)), image((64, 16))], True)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 3)], ids=["equal counts", "transposed", "different counts"])
@pytest.mark.parametrize("compiling", [False, True], ids=["", "while another thread compiles"])
def test_threads(dynamic, pair, compiling, monkeypatch):
    model, images, answers = dynamic
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # tells of the whole process
    start, wrong = threading.Barrier(2), []

    def work(i):
        start.wait()
        for _ in range(40):
            try:
                check(model, [images[i]], [answers[i]])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_replaced_patch_embedding_is_named():
    model = make(img_size=(24, 40))
    model.patch_embed.proj = torch.nn.Conv2d(3, model.embed_dim, model.patch_embed.patch_size)
    with pytest.raises(RuntimeError, match="the patch embedding's convolution was replaced"):
        model.set_input_size(img_size=(40, 24))


def test_script_save_load_copy(dynamic):
    model, images, answers = dynamic
    scripted = torch.jit.script(model)
    check(scripted, images, answers)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    check(loaded, images, answers)
    clone = copy.deepcopy(loaded)
    check(clone, images, answers)
    table, other = (m.patch_embed.proj.pool_skip_grid.table for m in (loaded, clone))
    assert table.data_ptr() != other.data_ptr()


def test_one_size_scripts_without_state_and_freezes():
    model, x = make(img_size=(24, 40)), image((24, 40))
    scripted = torch.jit.script(model)
    assert "table" not in str(scripted.inlined_graph)
    check(scripted, [x], [oracle(model, x)])
    check(torch.jit.freeze(scripted), [x], [oracle(model, x)])


@pytest.mark.parametrize("i", [2, 3])
def test_trace(dynamic, i):
    model, images, answers = dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, images[i])
    check(traced, [images[i]], [answers[i]])
    check(model, images, answers)


def test_fx_and_its_script(dynamic):
    model, images, answers = dynamic
    try:
        create_feature_extractor(make(plain=True), ["head"])
    except TypeError as error:
        pytest.skip(f"timm's own ViT is not traced by torch.fx {torch.__version__}: {error}")
    extractor = create_feature_extractor(model, ["head"])
    check(lambda x: extractor(x)["head"], images, answers)
    scripted = torch.jit.script(extractor)
    check(lambda x: scripted(x)["head"], images, answers)
    fixed = make()
    assert torch.equal(torch.fx.symbolic_trace(fixed)(image((32, 32))), fixed(image((32, 32))))


def export(model, x):
    """Exported at any batch, height and width, and whether torch froze the height all the same."""
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    x = next(node for node in exported.graph.nodes if node.name == exported.graph_signature.user_inputs[0])
    return exported.module(), str(x.meta["val"].shape[2]).isdigit()


def test_export_static_and_dynamic(dynamic):
    model, images, answers = dynamic
    check(torch.export.export(model, (images[3],)).module(), images[3:4], answers[3:4])
    # Sizes of 1 are frozen: no pooled map may have one, neither in the example nor later.
    exported, frozen = export(model, images[3])
    check(pickle.loads(pickle.dumps(model)), images, answers)
    if frozen and export(make(plain=True, dynamic_img_size=True), images[3])[1]:
        pytest.skip(f"timm's own ViT is not exported at dynamic sizes by torch {torch.__version__}")
    for size in ((32, 32), (48, 64), (24, 72)):
        check(exported, [image(size, 3)], [oracle(model, image(size, 3))])


def test_compile_fullgraph():
    model, images = make(dynamic_img_size=True, depth=1), [image(size) for size in SIZES[1:4]]
    answers = [oracle(model, x) for x in images]
    torch._dynamo.reset()
    check(torch.compile(model, fullgraph=True, dynamic=True, backend="eager"), images, answers)
    check(copy.deepcopy(model), images, answers)
    # The patch embedding runs eagerly, the block compiled.
    model.blocks[0] = torch.compile(model.blocks[0], fullgraph=True, backend="eager")
    check(model, images[:2], answers[:2])


def test_vmap_and_per_sample_gradients(dynamic):
    model, images, answers = dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(torch.vmap(lambda x: model(x[None])[0], randomness="different"), images[3:4], answers[3:4])
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        got = torch.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, images[3])
    name = "blocks.0.mlp.fc2.pool_skip.conv.weight"
    want = torch.func.grad(loss)(parameters, images[3][1])
    torch.testing.assert_close(got[name][1], want[name])


def test_copies_share_no_grid(dynamic):
    model, images, answers = dynamic
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        grid = clone.patch_embed.proj.pool_skip_grid
        assert grid is not model.patch_embed.proj.pool_skip_grid
        assert all(layer.grid is grid for layer in pool_skip_modules(clone).values())
        with pytest.raises(RuntimeError, match="none yet"):
            clone.blocks(torch.zeros(1, 17, 16))
        check(clone, images, answers)
        add_pool_skip(remove_pool_skip(clone))
    fixed = make(img_size=(24, 40))
    x = image((24, 40))
    assert torch.equal(pickle.loads(pickle.dumps(fixed))(x), fixed(x))


def _answer(model, x, queue):
    with torch.no_grad():
        queue.put(model(torch.tensor(x)).tolist())


def test_spawned_process(dynamic):
    model, images, answers = dynamic
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(model, images[3].tolist(), queue))
    process.start()
    answer = queue.get(timeout=60)
    process.join()
    torch.testing.assert_close(torch.tensor(answer), answers[3])


def test_built_on_meta_and_moved():
    with torch.device("meta"):
        model = PoolSkipVisionTransformer(**SMALL, dynamic_img_size=True)
    assert pool_skip_modules(model)["blocks.0.mlp.fc2.pool_skip"].conv.weight.is_meta
    real = make(dynamic_img_size=True)
    model.to_empty(device="cpu").eval().load_state_dict(real.state_dict())
    x = image((40, 24))
    assert torch.equal(model(x), real(x))
    torch.testing.assert_close(torch.jit.script(model)(x), real(x))
    torch.testing.assert_close(model.double()(x.double()).float(), real(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(x).dtype == torch.bfloat16


def test_features_and_intermediates():
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    model, x = make(**options), image((37, 50))
    last, maps = model.forward_intermediates(x, norm=True)
    assert [m.shape for m in maps] == [(2, 16, 5, 7)] * 2
    torch.testing.assert_close(last[:, 1:], maps[1].flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.forward_head(last), oracle(model, x))
    features = timm.create_model("test_vit_poolskip", features_only=True, out_indices=(1, 3), dynamic_img_pad=True)
    assert [f.shape[1:] for f in features(torch.randn(1, 3, 90, 65))] == [(64, 6, 5)] * 2
    assert len(pool_skip_modules(features)) == 4


def test_distilled_trains_both_heads():
    model = make(distilled=True).train()
    model.set_distilled_training()
    one, two = model(image((32, 32)))
    (one.square().sum() + two.square().sum()).backward()
    first, last = (block.mlp.fc2.pool_skip.conv.weight.grad.abs().sum() for block in model.blocks)
    assert first > 0
    assert last == 0  # both heads read prefix tokens alone
    assert model.blocks[0].mlp.fc2.pool_skip.grid.prefix == 2


@pytest.mark.parametrize("mode", ["", "jax", "moco", "reset"])
def test_initialisation_stays_the_default_of_torch(mode):
    for zero in (False, True):
        model = make(weight_init="skip" if mode == "reset" else mode, pool_skip={"zero_init": zero})
        for _ in range(2):
            for layer in pool_skip_modules(model).values():
                # Depthwise 3×3: uniform within ±1/3.
                assert layer.conv.weight.abs().max() == 0 if zero else 0.2 < layer.conv.weight.abs().max() <= 1 / 3
            model.init_weights()


class OwnPatchEmbed(PatchEmbed):
    """Not exactly timm's."""


def _wrong_models():
    yield timm.create_model("test_resnet"), "fc", "ResNet has no timm patch grid.*num_prefix_tokens.*PatchEmbed"
    yield make(plain=True, embed_layer=OwnPatchEmbed), "blocks.*.mlp.fc2", "has no timm patch grid"
    yield make(plain=True, patch_drop_rate=0.5), None, "patch_drop_rate"
    yield nn.ModuleList([make(plain=True), make(plain=True)]), "*.fc2", "2 patch grids"
    naflex = timm.create_model("test_vit", use_naflex=True, device="meta")
    yield naflex, "blocks.*.mlp.fc2", "NaFlexVit has no timm patch grid"


@pytest.mark.parametrize(("model", "placement", "message"), _wrong_models(), ids=["fc", "own", "drop", "two", "naflex"])
def test_models_without_a_grid_are_refused_unchanged(model, placement, message):
    modules = [name for name, _ in model.named_modules()]
    placement = [placement, f"{placement}*"] if placement == "fc" else placement
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=message):
            add_pool_skip(model, placement, dry_run=dry_run)
    assert [name for name, _ in model.named_modules()] == modules


def test_wrong_settings_and_inputs():
    with pytest.raises(ValueError, match=r"use_naflex=True.*dynamic_img_size"):
        timm.create_model("test_vit_poolskip", use_naflex=True)
    with pytest.raises(ValueError, match="use_naflex=True"):
        timm.create_model("deit_tiny_distilled_patch16_224_poolskip", use_naflex=True, device="meta")
    with pytest.raises(ValueError, match="patch_drop_rate"):
        timm.create_model("test_vit_poolskip", patch_drop_rate=0.1)
    model = make()
    with pytest.raises(RuntimeError, match=r"no patch grid of 9 patches.*1 prefix.*4x4"):
        model.blocks(torch.zeros(1, 10, 16))
    with pytest.raises(Exception, match="number of tokens is not that of the patch grid"):
        torch.jit.script(model).blocks(torch.zeros(1, 10, 16))
    with pytest.raises(ValueError, match=r"\[17, 16\]: expected 3 dimensions"):
        model.blocks[0].mlp.fc2(torch.zeros(17, 64))
    with pytest.raises(ValueError, match="positive multiple of groups=3"):
        TokenPoolSkip2d(16, attach_grid(model), groups=3)
