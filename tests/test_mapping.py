"""The mapping module: rules that check themselves, exact tables, a total planner, and agreement with transformers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from fairseq_models import VARIANTS, build

from convert.errors import PlanError
from convert.mapping import (
    Drop,
    Fill,
    Rename,
    Table,
    TensorSpec,
    infer_layout,
    map_state_dict,
    plan,
    rename_key,
    table,
)
from convert.rules import Zeros

TOY = [
    Rename("layers.{layer}.fc1.weight", "h.{layer}.up.weight", "ffn hidden"),
    Rename("proj.bias", "lm_head.bias", "vocab"),
    Drop("old.version", "a relic", optional=True),
    Fill("h.scale", Zeros(), "fairseq has none", "hidden"),
]
DIMS = {"ffn": 8, "hidden": 4, "vocab": 5}


def toy(rules: list[Rename | Drop | Fill] = TOY) -> Table:
    return Table.build("toy", rules, {"layer": range(2)}, DIMS)


def specs(**shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {key: TensorSpec(key, shape, "F32") for key, shape in shapes.items()}


WHOLE = {
    **specs(**{"layers.0.fc1.weight": (8, 4), "layers.1.fc1.weight": (8, 4)}),
    "proj.bias": TensorSpec("proj.bias", (5,), "F32"),
}


def test_a_complete_plan() -> None:
    made = plan(toy(), WHOLE)
    assert dict(made.renames) == {
        "layers.0.fc1.weight": "h.0.up.weight",
        "layers.1.fc1.weight": "h.1.up.weight",
        "proj.bias": "lm_head.bias",
    }
    assert made.drops == ()
    assert made.fills == (Fill("h.scale", Zeros(), "fairseq has none", "4"),)
    assert made.target["h.scale"] == TensorSpec("h.scale", (4,), "F32")


def test_every_problem_at_once() -> None:
    source = {key: spec for key, spec in WHOLE.items() if key != "layers.1.fc1.weight"}
    source |= {"surprise": TensorSpec("surprise", (1,), "F32"), "proj.bias": TensorSpec("proj.bias", (6,), "I64")}
    target = {key: spec for key, spec in toy().target.items() if key != "h.scale"} | specs(**{"h.norm": (4,)})
    with pytest.raises(PlanError) as raised:
        plan(toy(), source, target)
    assert [(problem.code, problem.key) for problem in raised.value.problems] == [
        ("dtype", "proj.bias"),
        ("missing-tensor", "layers.1.fc1.weight"),
        ("shape", "proj.bias"),
        ("unexpected-tensor", "surprise"),
        ("unfilled-target", "h.norm"),
        ("unknown-target", "h.scale"),
    ]


def test_a_table_that_contradicts_itself() -> None:
    twice = [*TOY, Rename("proj.bias", "other.bias", "vocab"), Fill("lm_head.bias", Zeros(), "why not", "vocab")]
    with pytest.raises(PlanError) as raised:
        toy(twice)
    assert [(p.code, p.key) for p in raised.value.problems] == [
        ("duplicate-source", "proj.bias"),
        ("duplicate-target", "lm_head.bias"),
    ]


def test_a_rule_whose_axes_differ() -> None:
    with pytest.raises(ValueError, match=r"axes differ: 'a\.\{layer\}' has \['layer'\], 'b\.\{n\}' has \['n'\]"):
        Rename("a.{layer}", "b.{n}", "hidden")


def test_the_inverse_of_the_inverse() -> None:
    back = toy().inverse
    assert back.renames == {target: source for source, target in toy().renames.items()}
    assert set(back.drops) == {"h.scale"}
    assert back.inverse.renames == toy().renames
    assert toy().digest != back.digest == toy().inverse.digest


@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_dict_of_real_fairseq_fits_the_class(name: str) -> None:
    """Names and shapes against transformers' own model on the meta device, and there and back again."""
    state = build(name).state_dict()
    made = table(infer_layout({key: value.shape for key, value in state.items()}))
    target = {"ctc": "Wav2Vec2ForCTC", "pretraining": "Wav2Vec2ForPreTraining"}[made.name.split()[1]]
    expected = {key: tuple(value.shape) for key, value in live(name, target).items()}
    assert {key: spec.shape for key, spec in made.target.items()} == expected
    moved = made.map_state_dict(state)
    returned = made.inverse.map_state_dict(moved | dict.fromkeys(made.fills))
    assert returned.keys() == state.keys()
    assert all(returned[key] is state[key] for key in state)


def live(name: str, target: str) -> dict[str, torch.Tensor]:
    """The state_dict of transformers' class for a variant's settings, without weights."""
    encoder = VARIANTS[name].encoder
    sizes = {"hidden_size": encoder["encoder_embed_dim"], "num_hidden_layers": encoder["encoder_layers"]}
    final = encoder["final_dim"] or encoder["encoder_embed_dim"]
    config = transformers.Wav2Vec2Config(
        **sizes,
        vocab_size=4 + len(VARIANTS[name].symbols),
        num_attention_heads=4,
        intermediate_size=encoder["encoder_ffn_embed_dim"],
        conv_dim=(32,) * 4,
        conv_kernel=(10, 3, 3, 2),
        conv_stride=(5, 2, 2, 2),
        conv_bias=encoder.get("conv_bias", False),
        feat_extract_norm={"default": "group", "layer_norm": "layer"}[encoder["extractor_mode"]],
        do_stable_layer_norm=encoder.get("layer_norm_first", False),
        num_conv_pos_embeddings=encoder["conv_pos"],
        num_conv_pos_embedding_groups=4,
        num_codevectors_per_group=10,
        codevector_dim=encoder["latent_dim"] or final,
        proj_codevector_dim=final,
    )
    with torch.device("meta"):
        return getattr(transformers, target)(config).state_dict()


def test_keys_for_other_peoples_scripts() -> None:
    state = build("ctc_base").state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert rename_key("w2v_encoder.proj.weight", shapes) == "lm_head.weight"
    assert rename_key("w2v_encoder.proj.weight", shapes, head="encoder") is None
    assert map_state_dict(state)["wav2vec2.masked_spec_embed"] is state["w2v_encoder.w2v_model.mask_emb"]
    with pytest.raises(PlanError) as raised:
        map_state_dict({**state, "w2v_encoder.new": state["w2v_encoder.proj.bias"]})
    assert [(p.code, p.key) for p in raised.value.problems] == [("unexpected-tensor", "w2v_encoder.new")]
    state.pop("w2v_encoder.proj.bias")
    with pytest.raises(PlanError) as raised:
        map_state_dict(state)
    assert ("missing-tensor", "w2v_encoder.proj.bias") in {(p.code, p.key) for p in raised.value.problems}


def test_a_head_that_is_not_there() -> None:
    layout = infer_layout({key: value.shape for key, value in build("pretrained_base").state_dict().items()})
    with pytest.raises(PlanError, match="a pretraining checkpoint has no ctc head"):
        table(layout, "ctc")


def test_another_geometry_is_another_table() -> None:
    layout = infer_layout({key: value.shape for key, value in build("ctc_base").state_dict().items()})
    assert (
        table(layout).digest
        == table(layout).digest
        != table(replace(layout, encoder=replace(layout.encoder, layers=3))).digest
    )


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys, convert.mapping; bad = {'torch', 'numpy', 'click', 'transformers'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
